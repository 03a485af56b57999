"""Models of transformers taken in: the same weights and logits, however they were kept."""

import shutil

import pytest
import torch
from conftest import run_ranks
from converting import (
    EXACT,
    FAMILIES,
    as_pickle,
    convert,
    copy_llama,
    load_weights,
    rewrite,
    save_families,
)
from full_state import read_full
from hf_weights import LAYERS, VOCABULARY, megatron_weights

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config import ModelConfig

families = pytest.fixture(save_families, scope="module")
folder = pytest.fixture(copy_llama)


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
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model

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
            manifest.read_manifest(tmp_path / name / "step00000000")["files"]
            for name in ("expected", f"{other.name}-zero")
        ]
        assert files[0] == files[1], other
    printed = capsys.readouterr().out
    assert ("left out, not of BertForMaskedLM: bert.embeddings.position_ids, " in printed) == (
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
            files.append(manifest.read_manifest(tag)["files"])
        assert files[0] == files[1]
