"""Conversions that are refused: what of the source does not fit, and where the message points."""

import dataclasses
import os
import re
import shutil

import pytest
import torch
from converting import convert, copy_llama, refused, rewrite, save_families, settings

from lag_megatron.checkpoint.megatron import dcp_metadata
from lag_megatron.checkpoint.megatron.dcp_metadata import StoredTensor
from lag_megatron.checkpoint.megatron.dcp_metadata_writer import write_metadata
from lag_megatron.checkpoint.state.box import Box
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import CheckpointError

families = pytest.fixture(save_families, scope="module")
folder = pytest.fixture(copy_llama)


def drop(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def put(name, value):
    return lambda weights: weights.update({name: value})


ATTENTION = "model.layers.1.self_attn.q_proj.weight"
DAMAGED = {
    "missing": (
        drop(ATTENTION),
        f"{ATTENTION} is missing (1 such), so the weights are not those of the LlamaForCausalLM "
        "that config.json describes",
    ),
    "extra": (put("model.new.weight", torch.zeros(2)), "model.new.weight is not a tensor of this"),
    "shape": (
        put(ATTENTION, torch.zeros(16, 12)),
        f"model.safetensors: {ATTENTION} has shape (16, 12), expected (16, 16) by config.json",
    ),
    "dtype": (
        put(ATTENTION, torch.zeros(16, 16, dtype=torch.int8)),
        f"{ATTENTION} is of the type I8, expected F32, BF16 or F16",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_do_not_fit_are_named(case, folder, tmp_path, capsys):
    change, message = DAMAGED[case]
    rewrite(folder, change)
    assert message in refused(capsys, 2, folder, tmp_path / "out", "--to", "zero")
    assert not (tmp_path / "out").exists()


SETTINGS = {
    "model_type": ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not known here"),
    "activation": ({"hidden_act": "relu"}, "hidden_act: 'relu', expected 'silu'"),
    "rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type 'linear', expected 'default'",
    ),
    "biases": ({"mlp_bias": True}, "attention_bias False, mlp_bias True: expected one value"),
    "type": ({"num_hidden_layers": "two"}, "config.json: cannot be read: "),
    "head_dim": ({"head_dim": 8}, "head_dim 8 times 4 heads is not the hidden_size 16"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_models_that_are_not_computed_here_are_named(case, folder, tmp_path, capsys):
    changes, message = SETTINGS[case]
    settings(folder, **changes)
    assert message in refused(capsys, 2, folder, tmp_path / "out", "--to", "zero")


def test_tied_weights_that_differ(families, tmp_path, capsys):
    folder = shutil.copytree(families["gpt2"][1], tmp_path / "gpt2")
    rewrite(folder, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}))
    error = refused(capsys, 2, folder, tmp_path / "out", "--to", "zero")
    assert "lm_head.weight differs from transformer.wte.weight" in error
    assert not list((tmp_path / "out").iterdir())


def test_too_small_a_vocabulary(folder, tmp_path, capsys):
    error = refused(capsys, 2, folder, tmp_path / "out", "--to", "zero", "--vocab-size", 60)
    assert "has 64 tokens, but --vocab-size is 60" in error


@pytest.mark.parametrize("form", ["zero", "universal", "megatron", "hf"])
def test_a_disk_that_is_too_small_is_told_first(form, checkpoint, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    error = refused(capsys, 2, checkpoint, tmp_path / "out", "--to", form)
    assert re.search(r"needs [1-9][\d.,]* [KM]iB, but only [\d.]+ [KM]iB are free", error)
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("size", ["abc", "", "0", "0.0GB", "-5GB", "5XB", "nan", "1e3", "9" * 19])
def test_a_shard_size_that_is_none(size, checkpoint, tmp_path, capsys):
    error = refused(capsys, 2, checkpoint, tmp_path / "o", "--to", "hf", f"--max-shard-size={size}")
    assert f"--max-shard-size {size}: expected a size above 0 like 5GB" in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg", (8,)),
        ("optimizer.state.fp32_param.embedding.word_embeddings.weight", (4, 256)),
    ],
)
def test_optimizer_states_of_other_forms_are_refused(key, shape, checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "m", "--to", "megatron") == 0
    tag = tmp_path / "m" / "iter_0000003"
    contents = dcp_metadata.read_metadata(tag)
    box = Box(tuple(0 for _ in shape), shape)
    place = next(iter(contents.tensors.values())).chunks[0][1]
    tensors = {k: t for k, t in contents.tensors.items() if not k.startswith("optimizer.")}
    tensors[key] = StoredTensor(
        torch.float32, shape, ((box, dataclasses.replace(place, length=1 << 20)),)
    )
    os.truncate(tag / place.file, 1 << 21)
    write_metadata(tag, tensors, contents.objects)
    (tag / "manifest.json").unlink()
    error = refused(capsys, 2, tag, tmp_path / "out", "--to", "zero")
    assert key in error
    assert "Convert with --weights-only" in error
    assert convert(tag, tmp_path / "out", "--to", "zero", "--weights-only", "--dry-run") == 0


def test_parts_merged_along_another_dimension_are_refused(checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "u", "--to", "universal") == 0
    tag = tmp_path / "u" / "step3_universal"
    (tag / "manifest.json").unlink()
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        file = tag / f"zero/decoder.layers.0.self_attention.linear_proj.weight/{state}.pt"
        stored = torch.load(file)
        torch.save(stored | {"param": stored["param"].reshape(32, 8)}, file)
    error = refused(capsys, 2, tag, tmp_path / "out", "--to", "zero")
    assert "were merged along another dimension" in error


def test_halves_merged_as_one_are_refused(families, tmp_path, capsys):
    ways = ("--to", "universal", "--world-size", 2, "--tensor-parallel", 2)
    assert convert(families["llama"][1], tmp_path / "u", *ways) == 0
    assert convert(tmp_path / "u", tmp_path / "whole", "--to", "zero", "--verify") == 0
    tag = tmp_path / "u" / "step00000000_universal"
    (tag / "manifest.json").unlink()
    file = tag / "zero/decoder.layers.1.mlp.linear_fc1.weight/fp32.pt"
    stored = torch.load(file)
    del stored["param_n_sub_params"]
    torch.save(stored, file)
    error = refused(capsys, 2, tag, tmp_path / "out", "--to", "zero")
    assert "a gate and an up half were merged as if they were one" in error


def test_parameters_unknown_to_megatron_are_refused():
    from lag_megatron.checkpoint.megatron.param_names import in_model_order

    with pytest.raises(CheckpointError, match=r"layers\.0\.mixer\.weight: not a parameter that is"):
        in_model_order(["decoder.layers.0.mixer.weight"])


def test_a_vocabulary_of_another_size_is_told_as_such(checkpoint, tmp_path, capsys):
    error = refused(capsys, 2, checkpoint, tmp_path / "hf", "--to", "hf", "--vocab-size", 999)
    assert "rows of tokens, not 999" in error
    assert "--max-shard-size" not in error
