"""Checkpoints written as directories of transformers compute what the model computes.

The reference is our own model on one rank, its weights read from the shards by the tests' own
reader, so a mistake of the exporter's reader or of its tables cannot hide itself.
"""

import json
from dataclasses import asdict, replace

import pytest
import tokenizers
import torch
import transformers
from conftest import PICO_VOCABULARY, pico_config, run_ranks, train_and_save
from families import family_batches
from full_state import read_full
from tokenizers import models, pre_tokenizers, processors

from lag_megatron.checkpoint.hf import tensor_map
from lag_megatron.checkpoint.hf.architecture import architecture_of
from lag_megatron.checkpoint.hf.tokenizer import TokenizerFile
from lag_megatron.checkpoint.open import describe_any
from lag_megatron.checkpoint.writer.job import write
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.errors import CheckpointError, ConfigError, PlanError
from lag_megatron.evaluation.export import ExportOptions, export_to_transformers
from lag_megatron.growth.apply.conversion import Conversion

WORDS = 50  # of 64 rows: the rest is padding
END = "<|endoftext|>"


def make_checkpoint(folder, *, world=1, **model):
    """A checkpoint of three steps, after which no bias is 0 and no norm 1, and its config."""
    config = pico_config(**model)
    run_ranks(train_and_save_described, world, config, folder)
    return folder / "step3", config


def train_and_save_described(config, folder):
    train_and_save(config, folder, client_state={"model": asdict(config.model)})


def our_logits(config, state, tokens):
    """Logits (b, s, v) of our model on one rank with these whole tensors."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model

    start_world(tensor=1)
    model = build_model(
        config.model,
        replace(config.parallel, tensor=1),
        num_layers=config.model.num_layers,
        vocab_size=PICO_VOCABULARY,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = state["fp32", name]
            assert value.dim() > 1 or float((value - value.round()).abs().max()) > 1e-4
            parameter.copy_(value)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits = model.eval()(tokens, positions, None).float()
    stop_world()
    return logits


def expected_logits(path, config, *, world, tokens):
    parallel = config.parallel
    state, _ = read_full(
        path,
        stage=parallel.zero_stage,
        data_size=world // parallel.tensor,
        tensor_size=parallel.tensor,
        precision=parallel.precision,
        gated=config.model.activation == "swiglu",
    )
    return run_ranks(our_logits, 1, config, state, tokens)[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Words w0, w1, ... and an end of document, with a template that would add one to each text."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words = {END: 0} | {f"w{i}": i for i in range(1, WORDS)}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token=END))
    backend.add_special_tokens([END])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    backend.save(str(path))
    return TokenizerFile(path, end_id=0)


def export(path, out, **options):
    """A ZeRO checkpoint as a directory of transformers."""
    write(Conversion(source=ZeroCheckpoint.open(path), to="hf", **options).job(out))


LLAMA_BIASED = {"llama": True, "bias": True, "tied_embeddings": True}
CASES = {
    "gpt2-zero1x2": (2, {}),
    "gpt2-zero3x2-untied": (2, {"zero_stage": 3, "tied_embeddings": False}),
    "gpt2-zero1-tp2-eps": (2, {"tensor": 2, "norm_eps": 1e-2}),
    "llama-zero1-tp2": (2, {"llama": True, "tensor": 2, "rotary_base": 50}),
    "llama-zero3x2": (2, {"llama": True, "zero_stage": 3, "norm_eps": 1e-2}),
    "llama-zero0-biased-tied": (1, {"zero_stage": 0, **LLAMA_BIASED}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_logits(case, tokenizer, tmp_path):
    world, model = CASES[case]
    path, config = make_checkpoint(tmp_path, world=world, **model)
    out = tmp_path / "hf"
    export(path, out, tokenizer=tokenizer, max_shard_size=5_000)
    tokens = torch.randint(0, WORDS, (3, 8), generator=torch.Generator().manual_seed(5))
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype="float32", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        logits = loaded.eval()(tokens).logits
    expected = expected_logits(path, config, world=world, tokens=tokens)[..., :WORDS]
    assert logits.shape == expected.shape
    assert float(expected.abs().max()) > 0.05
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


BERT = {
    "family": "bert",
    "norm_position": "post",
    "activation": "gelu_exact",
    "token_types": 2,
    "norm_eps": 1e-2,
}
BERT_WORDS = ["[CLS]", "[SEP]", "[MASK]", "[UNK]"]


@pytest.mark.parametrize(("world", "model"), [(2, {"zero_stage": 3}), (2, {"tensor": 2})])
def test_a_bert_fills_masks_as_ours_does(world, model, tmp_path):
    """Through AutoModelForMaskedLM, and by a pipeline that reads the tokenizer's files."""
    config = pico_config(**BERT, **model)
    run_ranks(train_bert, world, config, tmp_path)
    path, out = tmp_path / "step3", tmp_path / "hf"
    backend = tokenizers.Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate([*BERT_WORDS, *(f"w{n}" for n in range(4, WORDS))])},
            unk_token="[UNK]",
        )
    )
    backend.add_special_tokens(BERT_WORDS)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TokenizerFile(tmp_path / "tokenizer.json", end_id=1)
    export(path, out, tokenizer=tokenizer)
    loaded, report = transformers.AutoModelForMaskedLM.from_pretrained(
        out, dtype="float32", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = torch.randint(4, WORDS, (3, 8), generator=torch.Generator().manual_seed(5))
    kinds = torch.zeros_like(tokens)
    kinds[:, 5:] = 1
    with torch.no_grad():
        logits = loaded.eval()(tokens, token_type_ids=kinds).logits
    state, _ = read_full(
        path,
        stage=config.parallel.zero_stage,
        data_size=world // config.parallel.tensor,
        tensor_size=config.parallel.tensor,
        precision="fp32",
    )
    (expected,) = run_ranks(bert_logits, 1, config, state, tokens, kinds)
    assert float(expected.abs().max()) > 0.05
    torch.testing.assert_close(logits, expected[..., :WORDS], rtol=0, atol=1e-5)
    fill = transformers.pipeline("fill-mask", model=str(out), device="cpu")
    (best, *_) = fill("w7 w9 [MASK] w11")
    assert best["token_str"] in backend.get_vocab()
    ids = fill.tokenizer("w7 w9 [MASK] w11").input_ids
    assert ids == [0, 7, 9, 2, 11, 1]
    with (
        pytest.raises(ConfigError, match="a BERT, which predicts tokens that are masked"),
        export_to_transformers(path, ExportOptions(tokenizer=tokenizer.path)),
    ):
        pytest.fail("the tasks of the harness ask decoders")


def train_bert(config, folder):
    """A checkpoint of three steps of a BERT, which says its shape."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    layers = config.model.num_layers
    engine = Engine(config, world, num_layers=layers, vocab_size=PICO_VOCABULARY)
    for step in range(3):
        batches = family_batches(config, world, step)
        engine.train_step(batches, step=step, lr=1e-2)
    engine.save(folder, "step3", client_state={"step": 3, "model": asdict(config.model)})
    world.barrier()
    stop_world()


def bert_logits(config, state, tokens, kinds):
    """Logits (b, s, v) of our BERT on one rank with these whole tensors."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model

    start_world(tensor=1)
    model = build_model(
        config.model,
        replace(config.parallel, tensor=1, zero_stage=0),
        num_layers=config.model.num_layers,
        vocab_size=PICO_VOCABULARY,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["fp32", name])
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        whole = torch.ones_like(tokens, dtype=torch.bool)
        logits, _ = model.eval()(tokens, places, kinds, whole)
    stop_world()
    return logits.float()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("trained"))


def test_what_is_written_is_sound_and_complete(trained, tokenizer, tmp_path):
    path, config = trained
    out = tmp_path / "hf"
    export(path, out, tokenizer=tokenizer, max_shard_size=5_000)
    facts = describe_any(out)
    assert facts["problems"] == []
    assert facts["layers"] == config.model.num_layers
    assert facts["topology"]["precision"] == "fp32"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    settings = json.loads((out / "config.json").read_text())
    assert settings["architectures"] == ["GPT2LMHeadModel"]
    assert settings["vocab_size"] == WORDS
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded("w3 w1 w49").input_ids == [3, 1, 49]  # nothing before it, as in training
    assert loaded.eos_token_id == loaded.bos_token_id == 0
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 0
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_weights_are_the_masters_rounded(dtype, trained, tmp_path):
    path, _ = trained
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    weights = {}
    for name in ("fp32", dtype):
        out = tmp_path / name
        export(path, out, dtype=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        weights[name] = dict(model.named_parameters())
    for name, value in weights[dtype].items():
        assert value.dtype == wanted
        assert torch.equal(value, weights["fp32"][name].to(wanted))


def test_without_a_tokenizer_the_padding_stays(trained, tmp_path):
    path, _ = trained
    export(path, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["vocab_size"] == PICO_VOCABULARY
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


@pytest.mark.parametrize("architecture", ["GPT2", "LLAMA", "BERT"])
def test_the_tables_lead_back(architecture):
    rows = getattr(tensor_map, architecture)
    groups = 2 if architecture == "LLAMA" else 4
    heads = tensor_map.Heads(groups, head_size=3)
    draw = torch.Generator().manual_seed(1)
    for row in tensor_map.expand(rows, num_layers=2, bias=True, tied_embeddings=False):
        out = {"qkv": 3 * (4 + 2 * groups), "gate_up": 10}.get(row.kind, 8)
        shape = (out,) if row.megatron.endswith("bias") or "norm" in row.megatron else (out, 6)
        whole = torch.randn(shape, generator=draw)
        parts = tensor_map.to_transformers(row, whole, heads)
        assert [tuple(p.shape) for p in parts] == tensor_map.transformers_shapes(row, shape, heads)
        turned = [tensor_map.as_rows(part, row) for part in parts]
        found = tensor_map.row_runs(row, len(whole), heads)
        assert [run.low for run in found] == sorted(run.low for run in found)
        back = [turned[run.part][run.start : run.start + run.count] for run in found]
        assert torch.equal(torch.cat(back), whole)


REFUSED = {
    "norm": ({"norm": "rmsnorm"}, "model.norm: layernorm (got rmsnorm)"),
    "positions": ({"llama": True, "positions": "learned"}, "model.positions: rope (got learned)"),
    "activation": ({"activation": "swiglu"}, "model.activation: gelu or gelu_exact (got swiglu)"),
    "groups": ({"num_query_groups": 2}, "model.num_query_groups: 4, one a head (got 2)"),
    "bias": ({"bias": False}, "model.bias: True (got False)"),
    "norm_position": ({"norm_position": "post"}, "model.norm_position: pre (got post)"),
    "family": ({"family": "bert"}, "model.family: gpt (got bert)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_architecture_computes_is_refused(case):
    model, message = REFUSED[case]
    with pytest.raises(ConfigError) as raised:
        architecture_of(pico_config(**model).model)
    assert message in str(raised.value)


def test_refusals_leave_nothing_behind(trained, tokenizer, tmp_path):
    path, _ = trained
    (tmp_path / "there").mkdir()
    with pytest.raises(PlanError, match="exists already"):
        export(path, tmp_path / "there")
    backend = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    backend.add_tokens([f"more{i}" for i in range(20)])
    backend.save(str(tmp_path / "big.json"))
    big = TokenizerFile(tmp_path / "big.json", end_id=0)
    with pytest.raises(CheckpointError, match=r"has 70 tokens, but the model of .* only 64"):
        export(path, tmp_path / "hf", tokenizer=big)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.json", "there"]


def test_a_checkpoint_that_does_not_say_its_shape_is_refused(tmp_path):
    run_ranks(train_and_save, 1, pico_config(), tmp_path)
    with pytest.raises(CheckpointError, match="does not say what model it is"):
        export(tmp_path / "step3", tmp_path / "hf")


def test_other_tensors_than_the_configuration_says_are_refused(tmp_path):
    config = pico_config()
    lie = asdict(replace(config.model, tied_embeddings=False))
    run_ranks(save_as, 1, config, tmp_path, lie)
    with pytest.raises(CheckpointError, match=r"lacks output_layer\.weight"):
        export(tmp_path / "step3", tmp_path / "hf")


def save_as(config, folder, model):
    train_and_save(config, folder, steps=1, tag="step3", client_state={"model": model})
