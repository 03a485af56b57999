"""Megatron-LM's checkpoints of one file a rank: their weights, and what is refused."""

import argparse
import shutil

import numpy as np
import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, run_ranks
from full_state import read_full
from hf_weights import hf_model, load_part, megatron_weights
from programs import inspect

from lag_megatron.checkpoint.storage.torch_zip import tensor_records
from lag_megatron.cli import convert_checkpoint

FILE = "model_optim_rng.pt"
SHAPE = {"llama": True, "tensor": 2, "hidden_size": 16, "ffn_hidden_size": 24, "seq_length": 12}


def save(folder, weights):
    """On each of two tensor-parallel ranks, as Megatron-LM's training saves."""
    from megatron.core.enums import ModelType

    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model

    world = start_world(tensor=2)
    config = pico_config(**SHAPE)
    model = build_model(config.model, config.parallel, num_layers=2, vocab_size=PICO_VOCABULARY)
    load_part(model, weights, rank=world.tensor_rank, size=2, gated=True)
    arguments = argparse.Namespace(
        num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4,
        group_query_attention=True, num_query_groups=2, max_position_embeddings=12, seq_length=12,
        position_embedding_type="rope", normalization="RMSNorm", swiglu=True,
        add_bias_linear=False, untie_embeddings_and_output_weights=True, norm_epsilon=1e-5,
        padded_vocab_size=PICO_VOCABULARY, model_type=ModelType.encoder_or_decoder,
    )  # fmt: skip
    place = folder / "iter_0000007" / f"mp_rank_{world.tensor_rank:02d}"
    place.mkdir(parents=True)
    rng = {"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}
    objects = {"args": arguments, "iteration": 7, "model": model.state_dict(), "rng_state": [rng]}
    torch.save(objects, place / FILE)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    stop_world()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("legacy"), hf_model("llama")
    run_ranks(save, 2, folder, megatron_weights("llama", model))
    return folder, model


def convert(*arguments):
    return convert_checkpoint.main([str(argument) for argument in arguments])


def test_weights_arrive_in_deepspeed_and_transformers(saved, tmp_path, capsys):
    folder, model = saved
    assert convert(folder, tmp_path / "zero", "--to", "zero", "--world-size", 3) == 0
    assert "the optimizer's states are left out" in capsys.readouterr().out
    tag = tmp_path / "zero" / "step00000007"
    state, steps = read_full(tag, stage=1, data_size=3, tensor_size=1, precision="fp32")
    assert steps == {0}
    for name, value in megatron_weights("llama", model).items():
        assert torch.equal(state["fp32", name], value), name
        assert not state["exp_avg_sq", name].any()
    assert convert(folder, tmp_path / "hf", "--to", "hf", "--verify") == 0
    back = type(model).from_pretrained(tmp_path / "hf")
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_inspect_tells_it(saved, capsys):
    assert inspect(saved[0]) == 0
    printed = capsys.readouterr().out
    assert "Megatron-LM, a file for each rank" in printed
    assert "2 layers" in printed
    assert "2 tensor-parallel" in printed


def test_what_is_missing_or_damaged_is_named(saved, tmp_path, capsys):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    file = folder / "iter_0000007" / "mp_rank_01" / FILE
    data = bytearray(file.read_bytes())
    record = max(tensor_records(file), key=lambda record: record.length)
    data[record.begin + record.length // 2] ^= 1
    file.write_bytes(data)
    assert convert(folder, tmp_path / "out", "--to", "zero") == 2
    assert f"damaged: mp_rank_01/{FILE}: " in capsys.readouterr().err
    file.unlink()
    assert convert(folder, tmp_path / "out", "--to", "zero") == 2
    assert f"mp_rank_01/{FILE}: missing" in capsys.readouterr().err
    (folder / "iter_0000007" / "mp_rank_01").rename(folder / "iter_0000007" / "mp_rank_00_001")
    assert convert(folder, tmp_path / "out", "--to", "zero") == 2
    assert "pipeline parallelism cut the model" in capsys.readouterr().err
