"""What grown parameters are made of: old layers untouched, new ones by init and moment policy."""

import pytest

from lag_megatron.checkpoint.state.box import full_box
from lag_megatron.checkpoint.state.layout import STATES
from lag_megatron.errors import PlanError
from lag_megatron.growth.growth_map import (
    Copy,
    depth_map,
    grown_names,
    identity_map,
    moment_policy,
)
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.weight_init import Constant, Normal

TENSORS = {
    "input_layernorm.weight": (4,),
    "mlp.linear_fc1.weight": (8, 4),
    "mlp.linear_fc2.weight": (4, 8),
}


def groups_of(layers):
    matrices = {"embedding.word_embeddings.weight": (16, 4)}
    vectors = {}
    for layer in range(layers):
        for name, shape in TENSORS.items():
            group = matrices if len(shape) > 1 else vectors
            group[f"decoder.layers.{layer}.{name}"] = shape
    vectors["decoder.final_norm.weight"] = (4,)
    return [matrices, vectors]


def plan(source=3, target=4, *, init="duplicate", moments="auto", index=1, block_size=1, seed=7):
    return GrowthPlan(
        operator="lag",
        options={"index": index, "block_size": block_size, "init": init},
        source_layers=source,
        target_layers=target,
        moments=moments,
        seed=seed,
    )


def sources(growth, name):
    (block,) = growth.blocks[name]
    return block.sources


def test_identity_keeps_everything_in_order():
    groups = groups_of(2)
    growth = identity_map(groups)
    assert growth.groups == groups
    for name, blocks in growth.blocks.items():
        assert [b.box for b in blocks] == [full_box(dict(groups[0] | groups[1])[name])]
        assert set(blocks[0].sources.values()) == {Copy(name, blocks[0].box.low)}


@pytest.mark.parametrize("init", ["duplicate", "random"])
@pytest.mark.parametrize("moments", ["auto", "copy", "zero", "borrow"])
def test_old_layers_keep_everything(init, moments):
    growth = depth_map(plan(init=init, moments=moments), groups_of(3))
    old_of = {0: 0, 1: 1, 3: 2}  # grown layer: old layer; layer 2 is new
    for name, (block,) in growth.blocks.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer == 2:
            continue
        old = name if layer is None else name.replace(f".{layer}.", f".{old_of[layer]}.", 1)
        assert block.sources == dict.fromkeys(STATES, Copy(old, block.box.low))


@pytest.mark.parametrize(
    ("init", "moments", "first", "second"),
    [
        ("duplicate", "auto", "copied", "copied"),
        ("duplicate", "copy", "copied", "copied"),
        ("duplicate", "zero", "zero", "zero"),
        ("duplicate", "borrow", "zero", "copied"),
        ("random", "auto", "zero", "copied"),
        ("random", "copy", "copied", "copied"),
        ("random", "zero", "zero", "zero"),
        ("random", "borrow", "zero", "copied"),
    ],
)
def test_moments_of_new_layers(init, moments, first, second):
    growth = depth_map(plan(init=init, moments=moments), groups_of(3))
    for tensor, shape in TENSORS.items():
        copied = Copy(f"decoder.layers.1.{tensor}", (0,) * len(shape))
        expected = {"copied": copied, "zero": Constant(0.0)}
        found = sources(growth, f"decoder.layers.2.{tensor}")
        assert (found["exp_avg"], found["exp_avg_sq"]) == (expected[first], expected[second])
        if init == "duplicate":
            assert found["fp32"] == copied


def test_random_layers_are_named_by_seed_and_place():
    growth = depth_map(plan(init="random"), groups_of(3))
    layer = "decoder.layers.2."
    assert sources(growth, layer + "input_layernorm.weight")["fp32"] == Constant(1.0)
    assert sources(growth, layer + "mlp.linear_fc1.weight")["fp32"] == Normal(
        0.02, f"growth/7/3-4/{layer}mlp.linear_fc1.weight"
    )
    scaled = sources(growth, layer + "mlp.linear_fc2.weight")["fp32"]
    assert scaled.std == pytest.approx(0.02 / 8**0.5)
    other = depth_map(plan(init="random", seed=8), groups_of(3))
    assert sources(other, layer + "mlp.linear_fc1.weight")["fp32"].key.startswith("growth/8/")


def test_two_events_of_one_run_draw_different_layers():
    first = depth_map(plan(init="random"), groups_of(3))
    second = depth_map(plan(source=4, target=5, init="random"), groups_of(4))
    keys = [
        block[0].sources["fp32"].key
        for growth in (first, second)
        for block in growth.blocks.values()
        if isinstance(block[0].sources["fp32"], Normal)
    ]
    assert len(keys) == len(set(keys))


def test_names_come_in_the_order_of_the_grown_model():
    growth = depth_map(plan(target=6, index=0, block_size=3), groups_of(3))
    assert growth.groups == groups_of(6)
    assert [list(group) for group in growth.groups] == [list(group) for group in groups_of(6)]
    copied = [
        growth.blocks[f"decoder.layers.{i}.input_layernorm.weight"][0].sources["fp32"].parameter
        for i in range(6)
    ]
    assert copied == [f"decoder.layers.{i}.input_layernorm.weight" for i in (0, 1, 2, 0, 1, 2)]


def test_names_without_layers_stay():
    names = ["embedding.weight", "head.weight"]
    grown = list(grown_names(names, plan().layer_map, None))
    assert grown == [(name, name, None) for name in names]


def test_auto_moments():
    assert {moment_policy(plan(init="random"), o) for o in plan(init="random").layer_map
            if o.is_new} == {"borrow"}  # fmt: skip
    assert {moment_policy(plan(), o) for o in plan().layer_map if o.is_new} == {"copy"}


def test_mistakes():
    with pytest.raises(PlanError, match="has 2 layers, but the plan grows from 3"):
        depth_map(plan(), groups_of(2))
    uneven = groups_of(3)
    uneven[0]["decoder.layers.2.mlp.linear_fc1.weight"] = (4, 4)
    with pytest.raises(PlanError, match="layer 2 has other parameters than layer 0"):
        depth_map(plan(), uneven)
    split = groups_of(3)
    split[0] = {"decoder.layers.0.x": (1,), "between": (1,), "decoder.layers.1.x": (1,),
                "decoder.layers.2.x": (1,)}  # fmt: skip
    with pytest.raises(PlanError, match="do not stand together"):
        depth_map(plan(), split)
