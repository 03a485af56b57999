"""The copy plan of one target rank: strided copies, from a growth map and two layouts.

Everything is computed from names, shapes and lengths; no tensor is opened.  Progressive stacking
of 2 layers to 4 under ZeRO-1 on two data-parallel ranks, with E of 6 elements and wN, the only
parameter of layer N, of 4 (``-`` is padding)::

    source rank 0   E  E  E  E  E  E  w0 w0
           rank 1   w0 w0 w1 w1 w1 w1 -  -
    target rank 0   E  E  E  E  E  E  w0 w0 w0 w0 w1 w1
           rank 1   w1 w1 w2 w2 w2 w2 w3 w3 w3 w3 -  -     (w2 is a copy of w0, w3 of w1)

    plan of target rank 1   source rank 0 [6:8] to [2:4]    first half of w2
                            source rank 1 [0:6] to [4:10]   second half of w2 and all of w3, joined
                            source rank 1 [4:6] to [0:2]    second half of w1
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lag_megatron.checkpoint.state.box import (
    Box,
    Shape,
    collapse,
    interval_boxes,
    strides_of,
)
from lag_megatron.checkpoint.state.layout import Container, Layout, Segment, State, Topology
from lag_megatron.checkpoint.state.optimizer_states import adam_state_of
from lag_megatron.checkpoint.state.tensor_parallel import ShardBox, cut_dim, shard_boxes
from lag_megatron.growth.growth_map import Copy, GrowthMap
from lag_megatron.growth.weight_init import WeightInit


@dataclass(frozen=True, slots=True)
class StridedSlice:
    """Strided elements of a flat buffer."""

    container: Container
    offset: int
    strides: Shape


@dataclass(frozen=True, slots=True)
class Move:
    """Copy ``shape`` elements from a buffer of source tensor rank ``tensor_rank``, scaled."""

    target: StridedSlice
    source: StridedSlice
    tensor_rank: int
    shape: Shape
    scale: float


@dataclass(frozen=True, slots=True)
class Draw:
    """Write initial values: those of ``box`` in an unsharded parameter of ``full_shape``."""

    target: StridedSlice
    shape: Shape
    init: WeightInit
    full_shape: Shape
    box: Box


@dataclass(frozen=True, slots=True)
class ShardedModel:
    """The source or the target of a growth.

    Attributes:
        layout: on one tensor-parallel rank.
        topology: of all ranks.
        shapes: of unsharded parameters.
        gated: whether fc1 holds a gate and an up half.
    """

    layout: Layout
    topology: Topology
    shapes: Mapping[str, Shape]
    gated: bool

    def shard_boxes(self, name: str, tensor_rank: int) -> Iterator[ShardBox]:
        """The boxes of an unsharded parameter that one tensor-parallel rank holds."""
        size = self.topology.tensor_size
        yield from shard_boxes(
            name, self.shapes[name], tensor_rank=tensor_rank, tensor_size=size, gated=self.gated
        )


def plan_rank(
    growth_map: GrowthMap,
    source: ShardedModel,
    target: ShardedModel,
    state: State,
    *,
    segments: Sequence[tuple[str, Segment]],
    tensor_rank: int,
) -> list[Move | Draw]:
    """The copies and draws that fill ``segments`` of ``state`` on one target rank.

    Args:
        growth_map: the source of each grown parameter's values.
        source: layout and topology of the old checkpoint.
        target: layout and topology of the grown one.
        state: of the segments.
        segments: intervals of grown parameters, with offsets in the target buffer.
        tensor_rank: of the target rank.

    Returns:
        moves, sorted by their position in the source and joined where they are contiguous on both
        sides, then draws.
    """
    moves: list[Move] = []
    draws: list[Draw] = []
    for name, segment in segments:
        same = _unchanged_source(growth_map, source, target, name, state)
        if same is not None:
            moves += _flat_moves(source, same, segment, tensor_rank)
            continue
        local = target.layout.shapes[name]
        for part in interval_boxes(local, segment.start, segment.length):
            for piece in target.shard_boxes(name, tensor_rank):
                held = part.intersect(Box(piece.local, piece.box.shape))
                if held is None:
                    continue
                seen = held.move(piece.local, piece.box.low)
                for block in growth_map.blocks[name]:
                    box = seen.intersect(block.box)
                    if box is None:
                        continue
                    inside = box.move(piece.box.low, piece.local)
                    place = _target_slice(segment, local, inside)
                    origin = block.sources[adam_state_of(state)]
                    if isinstance(origin, Copy):
                        wanted = box.move(block.box.low, origin.low)
                        moves += _moves(source, origin, wanted, place, tensor_rank)
                    else:
                        draws.append(Draw(place, box.shape, origin, target.shapes[name], box))
    return [*_joined(moves), *draws]


def _unchanged_source(
    growth_map: GrowthMap, source: ShardedModel, target: ShardedModel, name: str, state: State
) -> Copy | None:
    """The old parameter that a grown one copies as a whole, if both are sharded alike over ranks.

    Flat intervals are then copied as they are.  It is the usual case of growth in depth.
    """
    block, *others = growth_map.blocks[name]
    origin = block.sources[adam_state_of(state)]
    if others or not isinstance(origin, Copy) or any(origin.low):
        return None
    if source.shapes[origin.parameter] != target.shapes[name]:
        return None
    same_cut = source.topology.tensor_size == target.topology.tensor_size
    return origin if same_cut or cut_dim(name) is None else None


def _flat_moves(
    source: ShardedModel, origin: Copy, segment: Segment, tensor_rank: int
) -> Iterator[Move]:
    """Contiguous copies of a segment from the same elements of an old parameter."""
    end = segment.start + segment.length
    holder = tensor_rank % source.topology.tensor_size
    for part in source.layout.overlapping(origin.parameter, segment.start, segment.length):
        low, high = max(segment.start, part.start), min(end, part.start + part.length)
        if low < high:
            yield Move(
                StridedSlice(segment.container, segment.offset + low - segment.start, (1,)),
                StridedSlice(part.container, part.offset + low - part.start, (1,)),
                holder,
                (high - low,),
                origin.scale,
            )


def _target_slice(segment: Segment, local: Shape, box: Box) -> StridedSlice:
    offset = box.offset_in(local) - segment.start + segment.offset
    return StridedSlice(segment.container, offset, strides_of(local))


def _moves(
    source: ShardedModel, origin: Copy, wanted: Box, target: StridedSlice, tensor_rank: int
) -> Iterator[Move]:
    """Copies of the box ``wanted`` of an old parameter to the slice ``target``."""
    name = origin.parameter
    local = source.layout.shapes[name]
    steps = strides_of(local)
    for rank in _holders(name, source.topology, tensor_rank):
        for piece in source.shard_boxes(name, rank):
            box = wanted.intersect(piece.box)
            if box is None:
                continue
            held = box.move(piece.box.low, piece.local)
            for segment in source.layout.overlapping(name, *held.span_in(local)):
                for part in interval_boxes(local, segment.start, segment.length):
                    overlap = part.intersect(held)
                    if overlap is None:
                        continue
                    lead = overlap.move(piece.local, piece.box.low).move(
                        wanted.low, (0,) * len(local)
                    )
                    offset = sum(a * s for a, s in zip(lead.low, target.strides, strict=True))
                    shape, (to, here) = collapse(overlap.shape, target.strides, steps)
                    yield Move(
                        StridedSlice(target.container, target.offset + offset, to),
                        StridedSlice(
                            segment.container,
                            overlap.offset_in(local) - segment.start + segment.offset,
                            here,
                        ),
                        rank,
                        shape,
                        origin.scale,
                    )


def _holders(name: str, topology: Topology, tensor_rank: int) -> Sequence[int]:
    """Source tensor ranks to read from: all for a sharded parameter, one for a replicated one."""
    if cut_dim(name) is None:
        return (tensor_rank % topology.tensor_size,)
    return range(topology.tensor_size)


def _joined(moves: list[Move]) -> list[Move]:
    """Moves in source order, with those joined that are contiguous on both sides.

    A source layer may have several targets, so the move that another continues need not be the one
    before it.
    """
    result: list[Move] = []
    ends: dict[tuple[object, ...], int] = {}
    for move in sorted(moves, key=lambda m: (m.tensor_rank, m.source.container, m.source.offset,
                                             m.target.container, m.target.offset)):  # fmt: skip
        if not move.target.strides == move.source.strides == (1,):
            result.append(move)
            continue
        at = ends.pop(_corner(move, 0), None)
        if at is None:
            at = len(result)
            result.append(move)
        else:
            first = result[at]
            result[at] = replace(first, shape=(first.shape[0] + move.shape[0],))
        ends[_corner(move, move.shape[0])] = at
    return result


def _corner(move: Move, length: int) -> tuple[object, ...]:
    """A key for the point on both sides that a move reaches after ``length`` elements."""
    return (
        move.tensor_rank,
        move.scale,
        move.source.container,
        move.source.offset + length,
        move.target.container,
        move.target.offset + length,
    )
