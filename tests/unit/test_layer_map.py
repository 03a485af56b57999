"""Layer maps, operators, plans and pools."""

import dataclasses
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lag_megatron.config import GrowthConfig, PoolConfig
from lag_megatron.errors import PlanError
from lag_megatron.growth.layer_map import (
    draw,
    feasible_block_sizes,
    feasible_indices,
    lag_layer_map,
)
from lag_megatron.growth.operators import OPERATORS, layer_map_of
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.pool import build_pool

MAX_DEPTH = 8
EVERY_LAG = [
    (source, target, index, block_size)
    for source in range(1, MAX_DEPTH + 1)
    for target in range(source + 1, 2 * source + 1)
    for index in feasible_indices(source, target)
    for block_size in feasible_block_sizes(source, target)
]
EVERY_GROWTH = sorted({(source, target) for source, target, _, _ in EVERY_LAG})


def lag_map(source, target, index, block_size, init="duplicate"):
    return lag_layer_map(source, target, index=index, block_size=block_size, init=init)


def pool_of(source=12, target=16, seed=0, **pool):
    growth = GrowthConfig(pool=PoolConfig(**pool))
    return build_pool(growth, source_layers=source, target_layers=target, seed=seed, init_std=0.02)


@pytest.mark.parametrize(
    ("index", "block_size", "drawn"),
    [
        (0, 1, "1 1* 2 2* 3 3* 4 5 6"),
        (1, 1, "1 2 2* 3 3* 4 4* 5 6"),
        (2, 1, "1 2 3 3* 4 4* 5 5* 6"),
        (3, 1, "1 2 3 4 4* 5 5* 6 6*"),
        (0, 3, "1 2 3 1* 2* 3* 4 5 6"),
        (1, 3, "1 2 3 4 2* 3* 4* 5 6"),
        (2, 3, "1 2 3 4 5 3* 4* 5* 6"),
        (3, 3, "1 2 3 4 5 6 4* 5* 6*"),
    ],
)
def test_worked_table_6_to_9(index, block_size, drawn):
    assert draw(lag_map(6, 9, index, block_size)) == drawn
    fresh = " ".join("R" if "*" in layer else layer for layer in drawn.split())
    assert draw(lag_map(6, 9, index, block_size, "random")) == fresh


@pytest.mark.parametrize(
    ("index", "block_size", "drawn"),
    [
        (8, 4, "1 2 3 4 5 6 7 8 9 10 11 12 9* 10* 11* 12*"),
        (0, 2, "1 2 1* 2* 3 4 3* 4* 5 6 7 8 9 10 11 12"),
        (4, 1, "1 2 3 4 5 5* 6 6* 7 7* 8 8* 9 10 11 12"),
    ],
)
def test_worked_examples_12_to_16(index, block_size, drawn):
    assert draw(lag_map(12, 16, index, block_size)) == drawn


@pytest.mark.parametrize("init", ["duplicate", "random"])
@pytest.mark.parametrize(("source", "target", "index", "block_size"), EVERY_LAG)
def test_invariants_of_every_map(source, target, index, block_size, init):
    layer_map = lag_map(source, target, index, block_size, init)
    new = target - source
    assert len(layer_map) == target
    assert [o.source for o in layer_map if not o.is_new] == list(range(source))
    assert [o.source for o in layer_map if o.is_new] == list(range(index, index + new))
    assert all(o.init == init for o in layer_map if o.is_new)
    assert all(o.init == "duplicate" for o in layer_map if not o.is_new)
    # New layers come in blocks, each right after the old block that it continues.
    starts = [
        place
        for place, (before, here) in enumerate(pairwise(layer_map), start=1)
        if here.is_new and not before.is_new
    ]
    assert len(starts) == new // block_size
    for start in starts:
        old, block = layer_map[start - block_size : start], layer_map[start : start + block_size]
        assert all(o.is_new for o in block)
        assert [o.source for o in block] == [o.source for o in old]


@pytest.mark.parametrize(("source", "target"), EVERY_GROWTH)
def test_feasible_values_are_exactly_those_that_work(source, target):
    new = target - source
    for index in range(-1, source + 2):
        for block_size in range(-1, new + 2):
            feasible = index in feasible_indices(source, target)
            feasible &= block_size in feasible_block_sizes(source, target)
            if feasible:
                lag_map(source, target, index, block_size)
            else:
                with pytest.raises(PlanError):
                    lag_map(source, target, index, block_size)


def test_the_papers_space_12_to_16():
    maps = {
        lag_map(12, 16, index, block_size) for index in (0, 2, 4, 6, 8) for block_size in (1, 2, 4)
    }
    assert len(maps) == 15
    assert feasible_indices(12, 16) == range(9)
    assert feasible_block_sizes(12, 16) == (1, 2, 4)


@pytest.mark.parametrize(("source", "target"), EVERY_GROWTH)
def test_named_operators_are_points_of_the_space(source, target):
    top = {"index": 2 * source - target, "block_size": target - source}
    for name, init in (("last", "duplicate"), ("random_top", "random")):
        assert layer_map_of(name, source, target, {}) == lag_map(source, target, **top, init=init)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_a_docstring(name):
    assert OPERATORS[name].__doc__


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (4, 4, "cannot grow 4 layers to 4: the target must have more"),
        (4, 3, "cannot grow 4 layers to 3: the target must have more"),
        (0, 3, "cannot grow 0 layers to 3"),
        (4, 9, "cannot grow 4 layers to 9 in one event.*Largest target: 8"),
    ],
)
def test_impossible_depths(source, target, message):
    options = {
        "lag": {"index": 0, "block_size": 1, "init": "random"},
        "slices": {"layers": [0]},
    }
    only_lag = "Largest" in message
    for name in ("lag", "last", "random_top") if only_lag else set(OPERATORS) - {"identity"}:
        with pytest.raises(PlanError, match=message):
            layer_map_of(name, source, target, options.get(name, {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": 9}, r"index 9 is out of range for 12 -> 16 layers.*starts at 0 to 8"),
        ({"index": -1}, "index -1 is out of range"),
        ({"block_size": 3}, "block_size 3 does not divide the 4 new layers.*Allowed: 1, 2, 4"),
        ({"block_size": 0}, "block_size 0 does not divide"),
        ({"index": "4"}, "index must be a whole number .got '4'"),
        ({"index": True}, "index must be a whole number .got True"),
        ({"block_size": 2.0}, r"block_size must be a whole number .got 2\.0"),
        ({"init": "zero"}, "init must be duplicate or random .got 'zero'"),
        ({"width": 3}, "no option width. Its options: block_size, index, init, scale"),
        ({"scale": 1.5}, r"scale must be a number from 0 to 1 .got 1\.5"),
    ],
)
def test_wrong_options(options, message):
    options = {"index": 4, "block_size": 2, "init": "random", **options}
    with pytest.raises(PlanError, match=message):
        layer_map_of("lag", 12, 16, options)


def test_unknown_operator_missing_and_superfluous_options():
    with pytest.raises(PlanError, match=r"unknown operator 'lga'\. Known: identity, lag, last"):
        layer_map_of("lga", 12, 16, {})
    with pytest.raises(PlanError, match="'lag' needs the option block_size, init"):
        layer_map_of("lag", 12, 16, {"index": 0})
    with pytest.raises(PlanError, match=r"'last' has no option index\. Its options: scale"):
        layer_map_of("last", 12, 16, {"index": 0})
    with pytest.raises(PlanError, match=r"'llama_pro' has no option scale\. Its options: none"):
        layer_map_of("llama_pro", 12, 16, {"scale": 0})


LAG = {"index": 4, "block_size": 2, "init": "random"}


def test_plan_is_checked_when_made():
    with pytest.raises(PlanError, match="out of range"):
        GrowthPlan(operator="lag", options={**LAG, "index": 40}, source_layers=12, target_layers=16)
    with pytest.raises(PlanError, match=r"moments 'half' is not a policy\. Allowed: auto, copy"):
        GrowthPlan(operator="last", source_layers=4, target_layers=6, moments="half")


def test_plan_is_frozen():
    plan = GrowthPlan(operator="last", source_layers=4, target_layers=6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.seed = 1


def test_plan_layer_map():
    plan = GrowthPlan(operator="lag", options=LAG, source_layers=12, target_layers=16)
    assert plan.layer_map == lag_map(12, 16, 4, 2, "random")


@given(
    st.sampled_from(EVERY_LAG),
    st.sampled_from(["duplicate", "random"]),
    st.sampled_from(["auto", "copy", "zero", "borrow"]),
    st.integers(0, 2**63),
    st.floats(1e-6, 1.0),
)
def test_plan_survives_json(lag, init, moments, seed, init_std):
    source, target, index, block_size = lag
    plan = GrowthPlan(
        operator="lag",
        options={"index": index, "block_size": block_size, "init": init},
        source_layers=source,
        target_layers=target,
        moments=moments,
        seed=seed,
        init_std=init_std,
    )
    back = GrowthPlan.from_json(plan.to_json())
    assert back == plan
    assert back.digest == plan.digest


def test_digest_does_not_depend_on_the_order_of_options():
    def plan(options, **values):
        return GrowthPlan(
            operator="lag", options=options, source_layers=12, target_layers=16, **values
        )

    assert plan(LAG).digest == plan(dict(reversed(LAG.items()))).digest
    others = [plan({**LAG, "index": 5}), plan(LAG, seed=1), plan(LAG, moments="zero")]
    assert len({p.digest for p in (plan(LAG), *others)}) == 4
    assert len(plan(LAG).digest) == 16


def test_plan_read_from_a_file(tmp_path):
    plan = GrowthPlan(operator="last", source_layers=4, target_layers=6)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert GrowthPlan.read(path) == plan
    with pytest.raises(PlanError, match=r"none\.json: cannot read the plan: No such file"):
        GrowthPlan.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "plan.json: not JSON"),
        ("[1]", "expected a mapping with the keys"),
        ('{"operators": "last"}', "expected a mapping with the keys"),
        ('{"operator": "last"}', "source_layers"),
        ('{"operator": "last", "source_layers": 4, "target_layers": 9}', "cannot grow 4 layers"),
        ('{"operator": "last", "source_layers": "4", "target_layers": 9}', "plan.json"),
        ('{"operator": 3, "source_layers": 4, "target_layers": 6}', "unknown operator 3"),
        (
            '{"operator": "last", "source_layers": 4, "target_layers": 6, "options": [1]}',
            "plan.json",
        ),
    ],
)
def test_text_that_is_no_plan(text, message):
    with pytest.raises(PlanError, match=message):
        GrowthPlan.from_json(text, source="plan.json")


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
