"""Boxes, intervals and the layouts of ZeRO 0 to 3."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lag_megatron.checkpoint.state.box import (
    Box,
    collapse,
    full_box,
    interval_boxes,
    numel,
    strides_of,
)
from lag_megatron.checkpoint.state.layout import Container, Topology, make_layout, unsharded_layout
from lag_megatron.checkpoint.state.tensor_parallel import (
    CUTS,
    local_shape,
    shard_boxes,
    unsharded_shape,
)

SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)
GROUPS = st.lists(st.lists(SHAPES, min_size=1, max_size=6), min_size=1, max_size=3).map(
    lambda groups: [
        {f"g{g}.p{p}": shape for p, shape in enumerate(group)} for g, group in enumerate(groups)
    ]
)


def numbered(shape):
    return np.arange(numel(shape)).reshape(shape)


def inside(array, box):
    return array[tuple(slice(a, a + n) for a, n in zip(box.low, box.shape, strict=True))]


@given(SHAPES, st.data())
def test_interval_boxes_walk_the_interval_in_order(shape, data):
    start = data.draw(st.integers(0, numel(shape) - 1))
    length = data.draw(st.integers(0, numel(shape) - start))
    boxes = list(interval_boxes(shape, start, length))
    walked = [inside(numbered(shape), box).reshape(-1) for box in boxes]
    assert np.concatenate([[], *walked]).tolist() == list(range(start, start + length))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@given(SHAPES, st.data())
def test_boxes_meet_where_both_are(shape, data):
    def some_box():
        low = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        extent = (data.draw(st.integers(1, n - a)) for a, n in zip(low, shape, strict=True))
        return Box(low, tuple(extent))

    one, other = some_box(), some_box()
    array = numbered(shape)
    common = set(inside(array, one).flat) & set(inside(array, other).flat)
    met = one.intersect(other)
    assert (set(inside(array, met).flat) if met else set()) == common
    assert met == other.intersect(one)
    assert array.flat[one.offset_in(shape)] == inside(array, one).flat[0]
    assert one.intersect(full_box(shape)) == one
    assert one.move(one.low, other.low).low == other.low


@given(SHAPES, st.data())
def test_collapse_walks_the_same_elements_in_the_same_order(shape, data):
    order = data.draw(st.permutations(range(len(shape))))
    base = strides_of(tuple(shape[i] for i in order))
    permuted = tuple(base[order.index(i)] for i in range(len(shape)))
    padded = strides_of(tuple(n + 1 for n in shape))
    fewer, walked = collapse(shape, permuted, padded)

    def visit(extents, strides):
        return [
            sum(i * s for i, s in zip(index, strides, strict=True))
            for index in itertools.product(*map(range, extents))
        ]

    for before, after in zip((permuted, padded), walked, strict=True):
        assert visit(shape, before) == visit(fewer, after)
    assert len(fewer) <= max(len(shape), 1)


def test_a_contiguous_array_collapses_to_one_dimension():
    steps = strides_of((3, 4, 5))
    assert collapse((3, 4, 5), steps, steps) == ((60,), ((1,), (1,)))


def topologies(stages=(0, 1, 2, 3)):
    return st.builds(
        Topology,
        zero_stage=st.sampled_from(stages),
        data_size=st.integers(1, 7),
        tensor_size=st.just(1),
        precision=st.just("fp32"),
        sub_group_size=st.sampled_from([1, 7, 40, 10**9]),
    )


@given(GROUPS, topologies())
def test_layouts_hold_every_element_once_and_fit(groups, topology):
    layout = make_layout(groups, topology)
    used = {c: np.zeros(n, int) for c, n in layout.lengths.items()}
    for name, shape in layout.shapes.items():
        covered = np.zeros(numel(shape), int)
        for segment in layout.segments[name]:
            assert segment.length > 0
            covered[segment.start : segment.start + segment.length] += 1
            end = segment.offset + segment.length
            assert end <= layout.lengths[segment.container]
            used[segment.container][segment.offset : end] += 1
        assert covered.tolist() == [1] * numel(shape)
    for container, count in used.items():
        assert count.max(initial=0) <= 1
        filled = layout.filled[container]
        assert filled <= layout.lengths[container]
        if topology.zero_stage != 3:
            assert count.tolist() == [1] * filled + [0] * (len(count) - filled)
    seen = [(n, s) for rank in range(topology.data_size) for n, s in layout.segments_of_rank(rank)]
    assert sorted(seen, key=str) == sorted(
        ((n, s) for n, segments in layout.segments.items() for s in segments), key=str
    )


@given(GROUPS, topologies((1, 2)))
def test_flat_groups_are_cut_evenly_and_aligned(groups, topology):
    layout = make_layout(groups, topology)
    for key, group in enumerate(groups):
        lengths = {layout.lengths[Container(r, key)] for r in range(topology.data_size)}
        (length,) = lengths
        total = sum(map(numel, group.values()))
        assert length % 2 == 0
        assert 0 <= length * topology.data_size - total < 2 * topology.data_size
    assert layout == make_layout(groups, Topology(
        zero_stage=3 - topology.zero_stage, data_size=topology.data_size, tensor_size=1,
        precision="fp32"))  # fmt: skip


@given(GROUPS, topologies((3,)))
def test_zero3_cuts_each_parameter_evenly(groups, topology):
    layout = make_layout(groups, topology)
    for name, shape in layout.shapes.items():
        part = -(-numel(shape) // topology.data_size)
        for segment in layout.segments[name]:
            assert segment.start == segment.container.data_rank * part
            assert segment.length <= part
    assert [n for _, names in layout.subgroups for n in names] == list(layout.shapes)
    for key, (group, names) in enumerate(layout.subgroups):
        assert set(names) <= set(groups[group])
        parts = [-(-numel(groups[group][n]) // topology.data_size) for n in names]
        assert sum(parts[:-1]) < topology.sub_group_size
        assert layout.keys(0)[key] == key


def test_layouts_by_hand():
    groups = [{"a": (2, 3), "b": (5,)}, {"c": (1,)}]

    def lengths(stage, size=2):
        topology = Topology(
            zero_stage=stage, data_size=size, tensor_size=1, precision="fp32", sub_group_size=3
        )
        layout = make_layout(groups, topology)
        return [[layout.lengths[Container(r, k)] for k in layout.keys(r)] for r in range(size)]

    assert lengths(0, 1) == [[6, 5, 1]]
    assert lengths(1) == lengths(2) == [[6, 2], [6, 2]]
    assert lengths(1, 3) == [[4, 2], [4, 2], [4, 2]]
    assert lengths(3) == [[3, 3, 1], [3, 3, 1]]
    assert list(unsharded_layout(groups[0]).lengths.values()) == [6, 5]


CUT_SHAPES = (
    ("embedding.word_embeddings.weight", (16, 8)),
    ("decoder.layers.3.self_attention.linear_qkv.weight", (24, 8)),
    ("decoder.layers.3.self_attention.linear_qkv.bias", (24,)),
    ("decoder.layers.3.self_attention.linear_proj.weight", (8, 8)),
    ("decoder.layers.3.self_attention.linear_proj.bias", (8,)),
    ("decoder.layers.3.mlp.linear_fc1.weight", (32, 8)),
    ("decoder.layers.3.mlp.linear_fc2.weight", (8, 16)),
    ("decoder.final_layernorm.weight", (8,)),
)


@pytest.mark.parametrize(("name", "shape"), CUT_SHAPES, ids=[n for n, _ in CUT_SHAPES])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_tensor_parallel_pieces_are_the_whole(name, shape, size, gated):
    local = local_shape(name, shape, tensor_size=size)
    assert unsharded_shape(name, local, tensor_size=size) == shape
    seen = np.zeros(shape, int)
    for rank in range(size):
        held = np.zeros(local, int)
        for piece in shard_boxes(name, shape, tensor_rank=rank, tensor_size=size, gated=gated):
            inside(seen, piece.box)[...] += 1
            inside(held, Box(piece.local, piece.box.shape))[...] += 1
        assert (held == 1).all()
    copies = 1 if local != shape else size
    assert (seen == copies).all()


def test_gate_and_up_halves_are_cut_each_for_itself():
    name, shape = "decoder.layers.0.mlp.linear_fc1.weight", (8, 2)
    rows = [
        [p.box.low[0] for p in shard_boxes(name, shape, tensor_rank=r, tensor_size=2, gated=True)]
        for r in range(2)
    ]
    assert rows == [[0, 4], [2, 6]]


def test_every_cut_is_tried():
    assert set(CUTS.values()) == {0, 1}
