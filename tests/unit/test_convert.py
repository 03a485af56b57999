"""Conversions between formats: what arrives, and what a kill leaves."""

import dataclasses
import json
import os
import shutil

import pytest
import tokenizers
import torch
import transformers
from conftest import PICO_VOCABULARY, pico_config, run_ranks, train_and_save
from converting import (
    EXACT,
    FAMILIES,
    as_pickle,
    convert,
    load_weights,
    refused,
    rewrite,
    save_families,
)
from full_state import read_full
from hf_weights import HEADS, LAYERS, VOCABULARY, megatron_weights
from test_tools_checkpoint import grow, inspect
from tokenizers import models, pre_tokenizers

from lag_megatron.checkpoint import commit, parts
from lag_megatron.checkpoint.zero import ZeroCheckpoint
from lag_megatron.config import ModelConfig, OptimizerConfig


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """{family: (its model, its directory)}; never to be changed."""
    return save_families(tmp_path_factory)


@pytest.fixture
def folder(families, tmp_path):
    """A copy of the Llama's directory."""
    return shutil.copytree(families["llama"][1], tmp_path / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_through_every_format(family, families, tmp_path, capsys):
    model, source = families[family]
    step, tags = tmp_path, []
    ways = [
        ("zero", "--world-size", 3),
        ("universal",),
        ("zero", "--world-size", 2, "--tensor-parallel", 2, "--zero-stage", 3),
        ("megatron",),
        ("hf", "--max-shard-size", "20KB"),
    ]
    here = source
    for number, (form, *options) in enumerate(ways):
        step = tmp_path / str(number)
        assert convert(here, step, "--to", form, *options, "--verify") == 0, capsys.readouterr()
        assert "verified: every tensor" in capsys.readouterr().out
        assert inspect(step, "--verify") == 0
        tags.append(sorted(p.name for p in step.iterdir() if p.suffix != ".json")[0])
        here = step
    assert tags[:4] == ["latest", "latest_universal", "latest", "iter_0000000"]
    capsys.readouterr()
    back = type(model).from_pretrained(here)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(back.config, key) == getattr(model.config, key)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert load_weights(here).keys() == load_weights(source).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_import_is_the_same_model(family, families, tmp_path):
    """Weights by the tests' own map, and the logits of our model against transformers'."""
    model, source = families[family]
    assert convert(source, tmp_path, "--to", "zero", "--world-size", 2, *EXACT) == 0
    tag = tmp_path / "step00000000"
    state, steps = read_full(tag, stage=1, data_size=2, tensor_size=1, precision="fp32")
    expected = megatron_weights(family, model)
    assert steps == {0}
    for name, value in expected.items():
        assert torch.equal(state["fp32", name], value), name
        assert torch.equal(state["weight", name], value), name
        assert not state["exp_avg", name].any()
    assert {name for kind, name in state if kind == "fp32"} == set(expected)
    tokens = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(3))
    described = ModelConfig(**ZeroCheckpoint.open(tag).client_state["model"])
    weights = {name: value for (kind, name), value in state.items() if kind == "fp32"}
    (logits,) = run_ranks(our_logits, 1, described, weights, tokens)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-5)


def our_logits(model_config, weights, tokens):
    from lag_megatron.config import ParallelConfig
    from lag_megatron.model import build_model
    from lag_megatron.parallel import start_world, stop_world

    start_world(tensor=1)
    model = build_model(
        model_config, ParallelConfig(), num_layers=LAYERS, vocab_size=model_config.vocab_size
    )
    parameters = dict(model.named_parameters())
    assert list(parameters) == [n for n in parameters if n in weights]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        if model_config.family == "bert":
            whole = torch.ones_like(tokens, dtype=torch.bool)
            logits, _ = model.eval()(tokens, places, torch.zeros_like(tokens), whole)
        else:
            logits = model.eval()(tokens, places, None)
    stop_world()
    return logits.float()


def test_rows_that_pad_the_vocabulary_repeat_the_last(families, tmp_path):
    model, source = families["bert"]
    assert convert(source, tmp_path, "--to", "zero", "--zero-stage", 0) == 0
    state, _ = read_full(
        tmp_path / "step00000000", stage=0, data_size=1, tensor_size=1, precision="fp32"
    )
    words, bias = (
        state["fp32", n] for n in ("embedding.word_embeddings.weight", "output_layer.bias")
    )
    assert words.shape == (128, 16)
    assert torch.equal(words[:VOCABULARY], model.bert.embeddings.word_embeddings.weight)
    assert torch.equal(words[VOCABULARY:], words[VOCABULARY - 1].expand(128 - VOCABULARY, -1))
    assert torch.equal(bias[VOCABULARY:], bias[VOCABULARY - 1].expand(128 - VOCABULARY))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_ways_to_keep_the_same_weights(family, families, tmp_path, capsys):
    """A pickle; names of the bare model; tied weights twice; buffers and names of old versions."""
    _, source = families[family]
    assert convert(source, tmp_path / "expected", "--to", "zero") == 0
    pickled = shutil.copytree(source, tmp_path / "pickled")
    as_pickle(pickled)
    prefix = {"bert": "bert.", "gpt2": "transformer.", "llama": "model."}[family]
    bare = shutil.copytree(source, tmp_path / "bare")
    rewrite(bare, lambda weights: {k.removeprefix(prefix): v for k, v in weights.items()})
    old = shutil.copytree(source, tmp_path / "old")
    rewrite(old, {"bert": old_bert, "gpt2": old_gpt2, "llama": old_llama}[family])
    for other in (pickled, bare, old):
        assert convert(other, tmp_path / f"{other.name}-zero", "--to", "zero") == 0
        files = [
            commit.read_manifest(tmp_path / name / "step00000000")["files"]
            for name in ("expected", f"{other.name}-zero")
        ]
        assert files[0] == files[1], other
    told = capsys.readouterr().out
    assert ("left out, not of BertForMaskedLM: bert.embeddings.position_ids, " in told) == (
        family == "bert"
    )


def old_bert(weights):
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        weights = {k.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): v for k, v in weights.items()}
    weights["bert.embeddings.position_ids"] = torch.arange(12)[None]
    weights["bert.pooler.dense.weight"] = torch.zeros(16, 16)
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    words = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.weight"] = words.clone()
    return weights


def old_gpt2(weights):
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    weights["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()


def old_llama(weights):
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)


def test_goes_on_after_a_kill(checkpoint, tmp_path, monkeypatch):
    """Parts that are on disk are not written again, and the result is the same."""
    assert convert(checkpoint, tmp_path / "expected", "--to", "universal") == 0
    expected = commit.read_manifest(tmp_path / "expected" / "step3_universal")["files"]
    target, pid = tmp_path / "out", os.fork()
    if pid == 0:
        note, left = parts._Record.note, [5]

        def stop(self, name, files):
            note(self, name, files)
            left[0] -= 1
            if not left[0]:
                os._exit(9)

        parts._Record.note = stop
        convert(checkpoint, target, "--to", "universal", "--workers", 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not (target / "latest_universal").exists()
    draft = target / "step3_universal.tmp"
    lines = (draft / ".parts.jsonl").read_text().splitlines()
    done = [json.loads(line)["part"] for line in lines[1:]]
    assert len(done) == 5
    with (draft / ".parts.jsonl").open("a") as file:
        file.write('{"part": "torn')
    written, note = [], parts._Record.note
    monkeypatch.setattr(
        parts._Record,
        "note",
        lambda self, name, files: written.append(name) or note(self, name, files),
    )
    assert convert(checkpoint, target, "--to", "universal", "--verify") == 0
    assert written
    assert not set(written) & set(done)
    assert commit.read_manifest(target / "step3_universal")["files"] == expected
    assert not list((target / "step3_universal").glob(".parts*"))


def test_another_conversion_does_not_go_on_with_the_draft(checkpoint, tmp_path):
    draft = tmp_path / "out" / "step3_universal.tmp"
    draft.mkdir(parents=True)
    (draft / ".parts.jsonl").write_text('{"about": {}}\n{"part": "optimizer", "files": {}}\n')
    (draft / "stray").touch()
    assert convert(checkpoint, tmp_path / "out", "--to", "universal", "--verify") == 0
    assert not (tmp_path / "out" / "step3_universal" / "stray").exists()


def test_the_same_conversion_twice_is_done_once(checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "out", "--to", "megatron") == 0
    (tmp_path / "out" / "latest_checkpointed_iteration.txt").unlink()
    assert convert(checkpoint, tmp_path / "out", "--to", "megatron") == 0
    assert "there already: Megatron loads it" in capsys.readouterr().out
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "3"
    other = ("--to", "megatron", "--operator", "last", "--layers", 3)
    assert "exists already" in refused(capsys, 2, checkpoint, tmp_path / "out", *other)


def test_an_import_is_moved_and_grown_like_any_other(families, tmp_path):
    """It has no settings of DeepSpeed's: what these say is left out once more."""
    zero = tmp_path / "zero"
    assert convert(families["gpt2"][1], zero, "--to", "zero", *EXACT) == 0
    moved = ("--to", "zero", "--world-size", 2, "--verify")
    assert convert(zero, tmp_path / "moved", *moved) == 0
    assert grow(zero, tmp_path / "grown", "--operator", "last", "--layers", LAYERS + 1) == 0
    assert convert(tmp_path / "moved", tmp_path / "hf", "--to", "hf") == 0
    ours, theirs = load_weights(tmp_path / "hf"), load_weights(families["gpt2"][1])
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_pointer_that_cannot_be_written_is_told_as_such(
    checkpoint, tmp_path, monkeypatch, capsys
):
    def full(*unused):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parts.Order, "point", full)
        error = refused(capsys, 2, checkpoint, tmp_path / "out", "--to", "megatron")
    assert "is written, but latest_checkpointed_iteration.txt beside it is not" in error
    assert convert(checkpoint, tmp_path / "out", "--to", "megatron") == 0
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "out", "--to", "hf", "--dry-run") == 0
    assert f"{checkpoint} -> {tmp_path / 'out'}\nto write: 0.0 MiB" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_bert_grows_on_the_way_and_fills_masks(tmp_path):
    """12 to 16 layers from a directory of transformers to another, for a pipeline."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
    backend = tokenizers.Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    backend.add_special_tokens(words[:5])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    shape |= {"num_hidden_layers": 12, "max_position_embeddings": 16, "vocab_size": len(words)}
    config = transformers.BertConfig(**shape)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "bert12")
    options = ("index=6", "block_size=4", "init=duplicate")
    growth = ("--operator", "lag", *(x for o in options for x in ("--set", o)), "--layers", 16)
    out = tmp_path / "bert16"
    source = tmp_path / "bert12"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(source)
    assert convert(source, out, "--to", "hf", *growth, "--verify") == 0
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    grown = transformers.BertForMaskedLM.from_pretrained(out)
    assert grown.config.num_hidden_layers == 16
    assert grown.config.vocab_size == len(words)
    old, new = (m.bert.encoder.layer for m in (model, grown))
    plan = json.loads((out / "manifest.json").read_text())["plan"]
    assert (plan["source_layers"], plan["target_layers"]) == (12, 16)
    for number, layer in enumerate(new):
        twin = old[number if number < 10 else number - 4]  # layers 6 to 9 stand twice
        for name, value in layer.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), (number, name)
    fill = transformers.pipeline("fill-mask", model=str(out), device="cpu")
    (best, *_) = fill("w7 w9 [MASK] w11")
    assert best["token_str"] in words


def test_16_bit_weights_become_masters_without_loss(families, tmp_path):
    model, _ = families["llama"]
    half = type(model)(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path / "half")
    assert convert(tmp_path / "half", tmp_path / "zero", "--to", "zero", *EXACT, "--verify") == 0
    out = ("--to", "hf", "--dtype", "bf16", "--verify")
    assert convert(tmp_path / "zero", tmp_path / "back", *out) == 0
    for name, value in load_weights(tmp_path / "half").items():
        assert torch.equal(load_weights(tmp_path / "back")[name], value), name


def test_pickles_of_before_1_6(folder, checkpoint, tmp_path):
    """Which torch no more writes, but DeepSpeed can be told to, and models still come in."""
    weights, other = load_weights(folder), shutil.copytree(folder, tmp_path / "pickled")
    as_pickle(other)
    file = other / "pytorch_model.bin"
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    old = shutil.copytree(checkpoint, tmp_path / "old" / "step3")
    (old / "manifest.json").unlink()
    for file in old.glob("*.pt"):
        states = torch.load(file, weights_only=False)
        torch.save(states, file, _use_new_zipfile_serialization=False)
    for name, (expected, same) in {"hf": (folder, other), "ds": (checkpoint, old)}.items():
        files = []
        for source in (expected, same):
            target = tmp_path / f"{name}-{source.name}-{len(files)}"
            assert convert(source, target, "--to", "zero", "--zero-stage", 3) == 0
            (tag,) = target.glob("step*")
            files.append(commit.read_manifest(tag)["files"])
        assert files[0] == files[1]


def test_the_job_is_part_of_what_a_universal_checkpoint_is(checkpoint, tmp_path, capsys):
    """Under ZeRO-3 DeepSpeed looks for model files of other names."""
    out = tmp_path / "out"
    assert convert(checkpoint, out, "--to", "universal") == 0
    other = ("--to", "universal", "--world-size", 4, "--zero-stage", 3)
    assert "exists already" in refused(capsys, 2, checkpoint, out, *other)


def test_a_draft_of_other_files_is_not_gone_on_with(families, tmp_path, monkeypatch):
    _, source = families["gpt2"]
    seal, left = commit.seal, [2]

    def die(path):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return seal(path)

    monkeypatch.setattr(commit, "seal", die)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "hf", "--to", "hf", "--max-shard-size", "10KB", "--workers", 1)
    assert list(tmp_path.glob("hf.tmp/*"))
    monkeypatch.undo()
    sizes = ("--max-shard-size", "20KB", "--verify")
    assert convert(source, tmp_path / "hf", "--to", "hf", *sizes) == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "hf").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files


def test_what_megatrons_own_optimizer_asks_of_the_settings(checkpoint, tmp_path):
    from megatron.core.optimizer.optimizer import param_group_identifier_keys
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    assert convert(checkpoint, tmp_path / "m", "--to", "megatron") == 0
    common = torch.load(tmp_path / "m" / "iter_0000003" / "common.pt", weights_only=False)
    groups = common["optimizer"]["optimizer"]["param_groups"]
    assert [group["wd_mult"] for group in groups] == [1.0, 0.0]
    assert all(set(param_group_identifier_keys) <= set(group) for group in groups)
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-3, min_lr=0.0, lr_warmup_steps=1, lr_decay_steps=100,
        lr_decay_style="linear", start_wd=0.1, end_wd=0.1, wd_incr_steps=1,
        wd_incr_style="constant", override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )  # fmt: skip
    scheduler.load_state_dict(common["opt_param_scheduler"])
    assert scheduler.num_steps == 12  # three steps of four sequences


def test_adafactors_means_are_verified(tmp_path):
    config = pico_config(zero_stage=0)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(name="adafactor"))
    run_ranks(train_and_save, 1, config, tmp_path)
    ways = ("--to", "zero", "--zero-stage", 0, "--verify")
    assert convert(tmp_path / "step3", tmp_path / "out", *ways) == 0


@pytest.mark.parametrize("head", [True, False])
def test_the_order_of_parameters_is_megatrons(head):
    from lag_megatron.checkpoint.megatron_names import in_model_order

    bert = {"family": "bert", "token_types": 2, "sentence_head": head}
    for shape in ({}, {"llama": True}, bert, bert | {"norm_position": "post"}):
        (names,) = run_ranks(names_of, 1, pico_config(**shape))
        assert in_model_order(sorted(names)) == names


def names_of(config):
    from lag_megatron.model import build_model
    from lag_megatron.parallel import start_world, stop_world

    start_world(tensor=1)
    model = build_model(config.model, config.parallel, num_layers=2, vocab_size=PICO_VOCABULARY)
    names = [name for name, _ in model.named_parameters()]
    stop_world()
    return names


def test_the_grown_and_the_converted_agree(checkpoint, tmp_path):
    """Growing shards and then converting is converting with growth on the way."""
    growth = ("--operator", "last", "--layers", 3)
    assert grow(checkpoint, tmp_path / "grown", *growth) == 0
    assert convert(tmp_path / "grown", tmp_path / "a", "--to", "universal") == 0
    assert convert(checkpoint, tmp_path / "b", "--to", "universal", *growth) == 0
    files = [
        commit.read_manifest(tmp_path / name / "step3_universal")["files"] for name in ("a", "b")
    ]
    values = [{k: v for k, v in listed.items() if k.startswith("zero/")} for listed in files]
    assert values[0] == values[1]
    assert (
        ZeroCheckpoint.open(checkpoint).layout.shapes["embedding.word_embeddings.weight"][0]
        == PICO_VOCABULARY
    )
    assert HEADS == 4
