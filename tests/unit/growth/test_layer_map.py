"""Layer maps of LAG's space: worked tables, invariants of every map, depths and options refused."""

from itertools import pairwise

import pytest
from layer_maps import EVERY_LAG, lag_map

from lag_megatron.errors import PlanError
from lag_megatron.growth.operators import OPERATORS, layer_map_of
from lag_megatron.growth.operators.layer_map import (
    feasible_block_sizes,
    feasible_indices,
    format_layer_map,
)

EVERY_GROWTH = sorted({(source, target) for source, target, _, _ in EVERY_LAG})


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
    assert format_layer_map(lag_map(6, 9, index, block_size)) == drawn
    fresh = " ".join("R" if "*" in layer else layer for layer in drawn.split())
    assert format_layer_map(lag_map(6, 9, index, block_size, "random")) == fresh


@pytest.mark.parametrize(
    ("index", "block_size", "drawn"),
    [
        (8, 4, "1 2 3 4 5 6 7 8 9 10 11 12 9* 10* 11* 12*"),
        (0, 2, "1 2 1* 2* 3 4 3* 4* 5 6 7 8 9 10 11 12"),
        (4, 1, "1 2 3 4 5 5* 6 6* 7 7* 8 8* 9 10 11 12"),
    ],
)
def test_worked_examples_12_to_16(index, block_size, drawn):
    assert format_layer_map(lag_map(12, 16, index, block_size)) == drawn


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
