"""Converted checkpoints in the hands of the loaders that they are for: DeepSpeed's and Megatron's.

What the loaders took is saved by DeepSpeed, or read from the model, and compared with whole tensors
that the tests' own reader took from the original shards.
"""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import (
    PICO_VOCABULARY,
    pico_config,
    random_batches,
    run_ranks,
    sparing,
    train_and_save,
)
from full_state import read_full
from megatron_loader import load_dist

from lag_megatron.checkpoint.open import open_checkpoint
from lag_megatron.checkpoint.state.source import UNSHARDED
from lag_megatron.checkpoint.writer.job import write
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.growth.apply.conversion import Conversion
from lag_megatron.growth.apply.grown_state import GrownState, retarget
from lag_megatron.growth.apply.hardlink_dcp import hardlink_dcp
from lag_megatron.growth.apply.hardlink_universal import hardlink_universal
from lag_megatron.growth.plan import GrowthPlan

STATES = ("fp32", "exp_avg", "exp_avg_sq")
GROW = GrowthPlan(
    operator="lag",
    options={"index": 0, "block_size": 1, "init": "duplicate"},
    source_layers=2,
    target_layers=3,
)


def save_described(config, folder):
    train_and_save(config, folder, client_state={"model": asdict(config.model)})


def trained(folder, world, **shape):
    """A checkpoint of three steps, its configuration and its whole tensors."""
    config = pico_config(**shape)
    run_ranks(save_described, world, config, folder)
    return folder / "step3", config, full(folder / "step3", config, world)


def full(tag, config, world):
    parallel = config.parallel
    state, steps = read_full(
        tag,
        stage=parallel.zero_stage,
        data_size=world // parallel.tensor,
        tensor_size=parallel.tensor,
        precision=parallel.precision,
        gated=config.model.activation == "swiglu",
    )
    assert len(steps) == 1
    return {key: value for key, value in state.items() if key[0] in STATES}, steps


def load_universal(config, folder, out):
    """DeepSpeed's own load, and its save of what it took."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    config = replace(config, deepspeed={"checkpoint": {"load_universal": True}})
    layers = config.model.num_layers
    engine = Engine(config, world, num_layers=layers, vocab_size=PICO_VOCABULARY)
    path, client = engine.deepspeed_engine.load_checkpoint(
        str(folder), load_lr_scheduler_states=False
    )
    assert path is not None
    decays = [group["weight_decay"] for group in engine.state.torch_optimizer.param_groups]
    engine.save(out, "back", client_state=client["lag"])
    engine.train_step(random_batches(config, world, 3), step=3, lr=1e-2)
    stop_world()
    return decays


def target_of(world, **shape):
    """The job that will load: its configuration and topology."""
    config = pico_config(**shape)
    parallel = config.parallel
    return config, retarget(
        UNSHARDED,
        world_size=world,
        tensor_size=parallel.tensor,
        zero_stage=parallel.zero_stage,
        precision=parallel.precision,
    )


LLAMA = {"llama": True}
CASES = {
    "zero1x1-zero1x2": (1, {}, 2, {}),
    "zero1x2-zero1x1": (2, {}, 1, {}),
    "zero1tp2-zero1tp1": (2, {"tensor": 2}, 1, {}),
    "llama-zero1tp2-zero1tp1": (2, {"tensor": 2, **LLAMA}, 1, LLAMA),
    "llama-zero1tp1-zero1tp2": (1, LLAMA, 2, {"tensor": 2, **LLAMA}),
    "zero1x2-zero2x4": (2, {}, 4, {"zero_stage": 2}),
    "zero3x2-zero3x4": (2, {"zero_stage": 3}, 4, {"zero_stage": 3}),
    "zero1x2-zero3x2": (2, {}, 2, {"zero_stage": 3}),
    "zero3x2-zero1x2-bf16": (
        2,
        {"zero_stage": 3, "precision": "bf16"},
        2,
        {"precision": "bf16"},
    ),
}
QUICK = {"zero1x1-zero1x2", "llama-zero1tp2-zero1tp1", "zero1x2-zero3x2"}


@pytest.mark.parametrize("case", sparing(CASES, slow=lambda case: case not in QUICK))
def test_deepspeed_loads_universal(case, tmp_path):
    world, shape, other_world, other = CASES[case]
    path, _, (expected, steps) = trained(tmp_path / "old", world, **shape)
    config, topology = target_of(other_world, **other)
    conversion = Conversion(source=ZeroCheckpoint.open(path), to="universal", topology=topology)
    folder = tmp_path / "universal"
    write(conversion.job(conversion.target_dir(folder)))
    loaded = run_ranks(load_universal, other_world, config, folder, tmp_path)
    found, counts = full(tmp_path / "back", config, other_world)
    assert counts == steps
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    if config.parallel.zero_stage < 3:  # DeepSpeed gives all groups the first one's there
        assert loaded[0] == [0.1, 0.0]


@pytest.mark.parametrize("tensor", sparing([1, 2], slow=lambda tensor: tensor == 1))
@pytest.mark.parametrize(
    ("shape", "numbered"),
    [({}, False), (LLAMA, False), ({}, True)],
    ids=["gpt", "llama", "gpt-numbered"],
)
def test_megatron_loads_torch_dist(shape, numbered, tensor, tmp_path):
    path, config, (expected, _) = trained(tmp_path / "old", 2, **shape)
    conversion = Conversion(source=ZeroCheckpoint.open(path), to="megatron", stacked=not numbered)
    folder = tmp_path / "megatron"
    write(conversion.job(conversion.target_dir(folder)))
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "3"
    config = replace(config, parallel=replace(config.parallel, tensor=tensor))
    ranks = run_ranks(load_dist, tensor, config, folder / "iter_0000003", numbered)
    gated = config.model.activation == "swiglu"
    for rank, (found, iteration, sharding) in enumerate(ranks):
        assert (iteration, sharding) == (3, "fully_reshardable")
        for (state, name), value in expected.items():
            part = part_of(name, value, rank, tensor, gated)
            assert torch.equal(found[state, name], part), (state, name)
            if state == "fp32":
                assert torch.equal(found["weight", name], part), name


def part_of(name, whole, rank, size, gated):
    """What one tensor-parallel rank has of a parameter, written down once more."""
    if gated and "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    if "word_embeddings" in name or "output_layer" in name or "linear_qkv" in name:
        return whole.chunk(size)[rank]
    if "linear_fc1" in name:
        return whole.chunk(size)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(size, dim=1)[rank]
    return whole


def load_imported(config, folder):
    """DeepSpeed's own load of a converted checkpoint, and a step from there."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    layers = config.model.num_layers
    engine = Engine(config, world, num_layers=layers, vocab_size=PICO_VOCABULARY)
    clip = engine.deepspeed_engine.optimizer.clip_grad
    path, _ = engine.deepspeed_engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
    assert path is not None
    assert engine.deepspeed_engine.optimizer.clip_grad == clip > 0
    engine.save(folder.parent, "back", client_state={})
    engine.train_step(random_batches(config, world, 3), step=3, lr=1e-2)
    stop_world()


def test_growth_on_the_way_from_megatron_to_deepspeed(tmp_path):
    """A TP 2 checkpoint through torch_dist into ZeRO-1 of two ranks, three layers for two."""
    path, _, (expected, _) = trained(tmp_path / "old", 2, tensor=2)
    there = Conversion(source=ZeroCheckpoint.open(path), to="megatron")
    write(there.job(there.target_dir(tmp_path / "megatron")))
    config, topology = target_of(2, num_layers=3)
    source = open_checkpoint(tmp_path / "megatron")
    back = Conversion(source=source, to="zero", plan=GROW, topology=topology)
    write(back.job(back.target_dir(tmp_path / "grown")))
    run_ranks(load_imported, 2, config, tmp_path / "grown")
    found, _ = full(tmp_path / "back", config, 2)
    for (state, name), value in found.items():
        assert torch.equal(value, expected[state, before_growth(name)]), (state, name)


def before_growth(name):
    """The old parameter that a grown one has the values of."""
    layers = {"layers.1.": "layers.0.", "layers.2.": "layers.1."}
    return next((name.replace(a, b) for a, b in layers.items() if a in name), name)


def test_stock_loaders_take_growth_by_links(tmp_path):
    path, _, (expected, steps) = trained(tmp_path / "old", 2)
    config, topology = target_of(2, num_layers=3)
    for form in ("universal", "megatron"):
        there = Conversion(source=ZeroCheckpoint.open(path), to=form, topology=topology)
        write(there.job(there.target_dir(tmp_path / form)))
    source = open_checkpoint(tmp_path / "universal")
    write(
        hardlink_universal(
            GrownState(source, GROW, UNSHARDED), tmp_path / "linked" / "step3_universal"
        )
    )
    run_ranks(load_universal, 2, config, tmp_path / "linked", tmp_path)
    found, counts = full(tmp_path / "back", config, 2)
    assert counts == steps
    for (state, name), value in found.items():
        assert torch.equal(value, expected[state, before_growth(name)]), (state, name)
    source = open_checkpoint(tmp_path / "megatron")
    write(hardlink_dcp(GrownState(source, GROW, UNSHARDED), tmp_path / "linked" / "iter_0000003"))
    config = replace(config, parallel=replace(config.parallel, tensor=2))
    ranks = run_ranks(load_dist, 2, config, tmp_path / "linked" / "iter_0000003")
    for rank, (taken, _, _) in enumerate(ranks):
        for (state, name), value in taken.items():
            kept = "fp32" if state == "weight" else state
            part = part_of(name, expected[kept, before_growth(name)], rank, 2, gated=False)
            assert torch.equal(value, part), (state, name)
