"""Pools: the candidates of a growth event, and choices that leave none."""

import json

import pytest

from lag_megatron.config import GrowthConfig, PoolConfig
from lag_megatron.errors import PlanError
from lag_megatron.growth.pool import build_pool


def pool_of(source=12, target=16, seed=0, **pool):
    growth = GrowthConfig(pool=PoolConfig(**pool))
    return build_pool(growth, source_layers=source, target_layers=target, seed=seed, init_std=0.02)


def test_pool_of_the_paper():
    pool = pool_of(index=(0, 2, 4, 6, 8))
    assert len(pool) == 30
    assert len({c.id for c in pool}) == len({c.plan.digest for c in pool}) == 30
    assert len({c.plan.layer_map for c in pool}) == 30
    assert pool[0].id == "i0-b1-random"
    assert pool == pool_of(index=(0, 2, 4, 6, 8))


def test_pool_of_everything_feasible():
    assert len(pool_of(6, 9)) == 4 * 2 * 2
    assert [c.id for c in pool_of(1, 2)] == ["i0-b1-random", "i0-b1-duplicate"]


def test_pool_choices():
    assert [c.id for c in pool_of(index=8, block_size=4, init=("duplicate",))] == [
        "i8-b4-duplicate"
    ]
    twice = pool_of(index=(8, 8), block_size=(4, 4), init=("duplicate", "duplicate"))
    assert len(twice) == 1


def test_scale_is_an_axis_of_the_pool():
    pool = pool_of(index=8, block_size=4, scale=(1.0, 0.5, 0.0, 0.5))
    assert [c.id for c in pool] == [
        *("i8-b4-random", "i8-b4-random-s0.5", "i8-b4-random-s0"),
        *("i8-b4-duplicate", "i8-b4-duplicate-s0.5", "i8-b4-duplicate-s0"),
    ]
    assert [c.plan.options.get("scale") for c in pool] == 2 * [None, 0.5, 0.0]
    assert [c.plan.layer_map[-1].branch_scale for c in pool] == 2 * [1.0, 0.5, 0.0]
    assert [c.id for c in pool_of(index=8, block_size=4, scale=(0.25,))] == [
        "i8-b4-random-s0.25", "i8-b4-duplicate-s0.25",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("last", {}),
        ("last", {"scale": 0.5}),
        ("random_top", {}),
        ("midas", {}),
        ("interpolate", {}),
        ("slices", {"layers": "0-7,4-11"}),
        ("llama_pro", {}),
        ("post_ln_identity", {"after": [0, 0, 5, 11]}),
    ],
)
def test_a_fixed_operator_is_a_pool_of_one(operator, options):
    (only,) = pool_of(operator=operator, options=options)
    assert only.id == operator
    assert (only.plan.operator, only.plan.options) == (operator, options)


def test_options_of_a_fixed_operator_are_checked_with_the_plan():
    with pytest.raises(PlanError, match="'midas' has no option layers"):
        pool_of(operator="midas", options={"layers": "0-7"})
    with pytest.raises(PlanError, match="layers lists 8 layers, but the target has 16"):
        pool_of(operator="slices", options={"layers": "0-7"})


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"index": 9}, "index 9 is out of range"),
        ({"index": (0, 9)}, "index 9 is out of range"),
        ({"block_size": 3}, "block_size 3 does not divide"),
        ({"index": ()}, "the pool is empty"),
        ({"block_size": ()}, "the pool is empty"),
        ({"init": ()}, "the pool is empty"),
        ({"scale": ()}, "the pool is empty"),
        ({"scale": (2.0,)}, "scale must be a number from 0 to 1"),
    ],
)
def test_impossible_pools(pool, message):
    with pytest.raises(PlanError, match=message):
        pool_of(**pool)


def test_a_pool_cannot_more_than_double():
    with pytest.raises(PlanError, match="Largest target: 8"):
        pool_of(4, 9)


def test_description_of_a_candidate_is_plain_json():
    entry = pool_of(6, 9, index=3, block_size=3, init=("random",))[0].describe()
    assert json.loads(json.dumps(entry)) == entry
    assert entry["id"] == "i3-b3-random"
    assert (entry["operator"], entry["index"], entry["block_size"]) == ("lag", 3, 3)
    assert (entry["init"], entry["source_layers"], entry["target_layers"]) == ("random", 6, 9)
    assert entry["layer_map"][6] == {
        "source": 3, "new": True, "init": "random", "scale": 1.0,
    }  # fmt: skip
    assert entry["layer_map"][0] == {
        "source": 0, "new": False, "init": "duplicate", "scale": 1.0,
    }  # fmt: skip
    (scaled,) = pool_of(6, 9, index=3, block_size=3, init=("duplicate",), scale=(0.5,))
    assert scaled.describe()["scale"] == scaled.describe()["layer_map"][6]["scale"] == 0.5
