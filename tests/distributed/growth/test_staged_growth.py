"""Silent layers in DeepSpeed's shards of every topology: as defined, loaded, and on their way."""

import numpy as np
import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks, sparing
from full_state import differences, read_full
from numpy_layers import numpy_layer
from test_grow_matrix import Case, fresh_weights

from lag_megatron.growth.plan import GrowthPlan

SOURCE, TARGET = 2, 4
LAYERS = {"alternate": (0, None, 1, None), "append": (0, 1, None, None)}


def plan_of(placement, groups):
    options = {"placement": placement, "query_groups": groups}
    return GrowthPlan(
        operator="staged", options=options, source_layers=SOURCE, target_layers=TARGET
    )


def grow(config, folder, plans):
    """On each rank: validation losses of the base, and of each grown model now and 3 steps on.

    Every plan's state is saved as it was loaded from disk, and as it is when grown in place.
    """
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine
    from lag_megatron.growth.apply.grow_zero import grow_checkpoint
    from lag_megatron.growth.apply.grown_state import GrownState

    world = start_world(tensor=config.parallel.tensor)
    validation = [random_batches(config, world, 99)]
    source = Engine(config, world, num_layers=SOURCE, vocab_size=PICO_VOCABULARY)
    for step in range(3):
        source.train_step(random_batches(config, world, step), step=step, lr=1e-2)
    losses = {"source": source.evaluate(validation)[0]}
    source.save(folder, "source", client_state={"step": 3})
    world.barrier()
    engine = Engine(config, world, num_layers=TARGET, vocab_size=PICO_VOCABULARY)
    for name, plan in plans.items():
        if world.is_coordinator:
            grow_checkpoint(folder / "source", folder / name, plan)
        world.barrier()
        engine.load(folder / name)
        engine.save(folder, f"{name}-loaded", client_state={})
        engine.grow_from(GrownState(ZeroCheckpoint.open(folder / "source"), plan, engine.topology))
        engine.save(folder, f"{name}-live", client_state={})
        losses[name] = engine.evaluate(validation)
        for step in range(3, 6):
            engine.train_step(random_batches(config, world, step), step=step, lr=1e-3)
        losses[name] += engine.evaluate(validation)
    engine.save(folder, "later", client_state={})
    stop_world()
    return losses


def grown_by_definition(source, placement, *, heads, groups, gated, precision):
    """Whole tensors of the grown state, of numpy's identities and the source's old layers."""
    grown = {key: value for key, value in source.items() if ".layers." not in key[1]}
    shapes = {
        name.partition(".layers.0.")[2]: tuple(tensor.shape)
        for (state, name), tensor in source.items()
        if state == "fp32" and ".layers.0." in name
    }
    draw = fresh_weights(SOURCE, TARGET)
    for layer, old in enumerate(LAYERS[placement]):
        at = f"decoder.layers.{layer}."
        if old is not None:
            mark = f"decoder.layers.{old}."
            grown |= {(state, name.replace(mark, at)): tensor
                      for (state, name), tensor in source.items() if mark in name}  # fmt: skip
            continue
        silent = numpy_layer(
            shapes, groups=groups, heads=heads, gated=gated,
            normals=lambda tail, shape, at=at: draw(at + tail, shape).numpy().copy(),
        )  # fmt: skip
        for tail, array in silent.items():
            grown["fp32", at + tail] = torch.from_numpy(np.ascontiguousarray(array))
            for moment in ("exp_avg", "exp_avg_sq"):
                grown[moment, at + tail] = torch.zeros(array.shape)
            if ("weight", f"decoder.layers.0.{tail}") in source:
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                grown["weight", at + tail] = grown["fp32", at + tail].to(dtype)
    return grown


CASES = (
    *(Case(stage) for stage in range(4)),
    *(Case(stage, tensor=2) for stage in range(4)),
    *(Case(stage, "bf16") for stage in (0, 1, 3)),
    *(Case(stage, tensor=tensor, llama=True) for stage in (1, 3) for tensor in (1, 2)),
    Case(2, "bf16", tensor=2, llama=True),
)
FAST = {Case(0), Case(1), Case(3), Case(0, tensor=2), Case(3, "bf16"),
        Case(2, "bf16", tensor=2, llama=True), Case(3, llama=True)}  # fmt: skip


@pytest.mark.parametrize("case", sparing(CASES, slow=lambda case: case not in FAST), ids=str)
def test_shards_hold_the_layer_by_its_definition(case, tmp_path):
    config = pico_config(
        zero_stage=case.stage, precision=case.precision, tensor=case.tensor, llama=case.llama
    )
    heads, groups = config.model.num_attention_heads, config.model.num_query_groups
    assert (heads, groups) == (4, 2 if case.llama else 4)
    plans = {placement: plan_of(placement, groups) for placement in LAYERS}
    losses, *_ = run_ranks(grow, 2, config, tmp_path, plans)
    source, steps = read_full(tmp_path / "source", **case.topology)
    assert steps == {3.0}
    for placement in plans:
        expected = grown_by_definition(
            source, placement, heads=heads, groups=groups, gated=case.llama,
            precision=case.precision,
        )  # fmt: skip
        for tag in (placement, f"{placement}-loaded", f"{placement}-live"):
            found, steps = read_full(tmp_path / tag, **case.topology)
            assert steps == {3.0}
            assert differences(found, expected) == [], tag
        after, later = losses[placement]
        tolerance = 1e-2 if case.precision == "bf16" else 1e-6
        assert after == pytest.approx(losses["source"], abs=tolerance)
        assert np.isfinite(later)
        assert later != after
    moved, _ = read_full(tmp_path / "later", **case.topology)
    for (state, name), tensor in expected.items():  # the last plan's, after three steps
        if state == "fp32" and name.endswith("weight"):
            assert not torch.equal(moved[state, name], tensor), name
