"""Weights and moments of staged training's new layers, against whole tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_layers import numpy_layer
from staged_plans import SOURCE, VARIANTS, groups_of, grown_name, places, plan_of
from test_copy_plan import TOPOLOGIES, check, dense
from torch_models import grow_dense, random_stack, state_of

from lag_megatron.checkpoint.state.box import Box, full_box
from lag_megatron.checkpoint.state.layout import STATES
from lag_megatron.growth.growth_map import depth_map, moment_policy
from lag_megatron.growth.weight_init import Diagonals, Normal, fill, normal

MODELS = st.fixed_dictionaries({
    "hidden": st.sampled_from([8, 16]),
    "ffn": st.sampled_from([4, 8, 12, 20]),
    "groups": st.just(4),
    "heads": st.sampled_from([4, 8]),
    "gated": st.booleans(),
    "bias": st.booleans(),
})  # fmt: skip


def dense_growth(groups, tensors, plan, state, model):
    """The whole grown model, old layers copied, new ones by ``numpy_layer``."""
    grown = {n: t for n, t in tensors.items() if ".layers." not in n}
    for layer, origin in enumerate(plan.layer_map):
        mark, here = f".layers.{origin.source}.", f"decoder.layers.{layer}."
        inside = {n.partition(mark)[2]: t for n, t in tensors.items() if mark in n}

        def normals(tail, shape, here=here):
            key = f"growth/1234/{plan.source_layers}-{plan.target_layers}/{here}{tail}"
            return normal(Normal(0.02, key), 0, math.prod(shape)).reshape(shape)

        if origin.is_new and state == "fp32":
            shapes = {tail: tuple(t.shape) for tail, t in inside.items()}
            facts = {k: model[k] for k in ("groups", "heads", "gated")}
            made = numpy_layer(shapes, **facts, normals=normals)
            inside = {tail: torch.from_numpy(array) for tail, array in made.items()}
        elif origin.is_new:
            inside = {tail: torch.zeros_like(t) for tail, t in inside.items()}
        grown |= {here + tail: t for tail, t in inside.items()}
    return grown


@settings(max_examples=120)
@given(MODELS, TOPOLOGIES, TOPOLOGIES, st.sampled_from(STATES), st.data())
def test_weights_and_moments_under_any_topology(model, source, target, state, data):
    placement = data.draw(st.sampled_from(["alternate", "append"]))
    plan = plan_of(source=2, placement=placement)
    groups = groups_of(2, **model)
    tensors = dense(groups, 5)
    expected = dense_growth(groups, tensors, plan, state, model)
    growth = depth_map(plan, groups, query_groups=model["groups"])
    check(growth, groups, source, target, model["gated"], expected, state, tensors)


def test_copies_keep_matrices_and_silence_the_rest():
    plan = plan_of(matrices="copy", placement="append")
    for kind in ("gpt", "llama"):
        old = state_of(random_stack(kind, SOURCE))
        new = grow_dense(plan, old)
        for name, tensor in old.items():
            if ".layers." not in name:
                continue
            layer = int(name.split(".")[2])
            found = new[name.replace(f".{layer}.", f".{SOURCE + layer}.", 1)]
            gated = kind == "llama"
            is_zero = name.endswith("bias") or "input_layernorm" in name
            is_zero |= ("linear_fc2" in name) if gated else ("norm" in name)
            assert torch.equal(found, torch.zeros_like(tensor) if is_zero else tensor), name


@given(st.data())
def test_a_box_of_diagonals_is_that_of_the_whole(data):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    cut = data.draw(st.integers(0, rows))
    runs = [(first, data.draw(st.integers(0, columns - 1)), data.draw(st.integers(1, last - first)))
            for first, last in ((0, cut), (cut, rows)) if last > first]  # fmt: skip
    runs = tuple((row, low, min(n, columns - low)) for row, low, n in runs)
    rest = data.draw(st.sampled_from([None, Normal(1.0, "rest")]))
    everything = np.zeros((rows, columns), np.float32)
    if rest:
        everything = normal(rest, 0, rows * columns).reshape(rows, columns)
    for row, low, length in runs:
        everything[row : row + length] = np.eye(length, columns, low, dtype=np.float32)
    low = (data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1)))
    box = Box(low, (data.draw(st.integers(1, rows - low[0])),
                    data.draw(st.integers(1, columns - low[1]))))  # fmt: skip
    for wanted in (box, full_box((rows, columns))):
        part = torch.full(wanted.shape, math.nan)
        fill(part, Diagonals(runs, rest), shape=(rows, columns), box=wanted)
        (top, left), (height, width) = wanted.low, wanted.shape
        assert np.array_equal(part.numpy(), everything[top : top + height, left : left + width])


@pytest.mark.parametrize("moments", ["auto", "zero", "borrow", "copy"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_moments(variant, moments):
    """Old layers keep theirs, bit for bit (published code overwrote them); new by the policy."""
    plan = plan_of(moments=moments, **VARIANTS[variant])
    policy = "zero" if moments == "auto" else moments
    assert {moment_policy(plan, o) for o in plan.layer_map if o.is_new} == {policy}
    kept, new = places(plan)
    for seed, state in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        old = state_of(random_stack("llama", SOURCE, seed=seed))
        found = grow_dense(plan, old, state)
        copied = policy == "copy" or (policy == "borrow" and state == "exp_avg_sq")
        for name, tensor in old.items():
            assert torch.equal(found[grown_name(name, plan)], tensor)
            if ".layers." in name:
                layer = int(name.split(".")[2])
                there = found[name.replace(f".{layer}.", f".{new[layer]}.", 1)]
                assert torch.equal(there, tensor if copied else torch.zeros_like(tensor)), name
        assert len(kept) == len(new) == SOURCE
