"""From a growth map and two layouts to strided copies: the plan of one target rank.

Everything is computed from names, shapes and lengths; no tensor is opened.
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
from lag_megatron.checkpoint.state.optimizer_states import role_of
from lag_megatron.checkpoint.state.tensor_parallel import Piece, cut_dim, pieces
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
    """Copy ``shape`` elements from a buffer of source tensor rank ``tensor_rank``, times scale."""

    target: StridedSlice
    source: StridedSlice
    tensor_rank: int
    shape: Shape
    scale: float


@dataclass(frozen=True, slots=True)
class Draw:
    """Write fresh values: ``box`` of a whole parameter of shape ``whole``."""

    target: StridedSlice
    shape: Shape
    fresh: WeightInit
    whole: Shape
    box: Box


@dataclass(frozen=True, slots=True)
class Side:
    """A layout with what is needed to find whole parameters in it."""

    layout: Layout
    topology: Topology
    shapes: Mapping[str, Shape]
    gated: bool

    def pieces(self, name: str, tensor_rank: int) -> Iterator[Piece]:
        """Boxes of a whole parameter on one tensor rank."""
        size = self.topology.tensor_size
        yield from pieces(
            name, self.shapes[name], tensor_rank=tensor_rank, tensor_size=size, gated=self.gated
        )


def plan_rank(
    growth: GrowthMap,
    source: Side,
    target: Side,
    state: State,
    *,
    segments: Sequence[tuple[str, Segment]],
    tensor_rank: int,
) -> list[Move | Draw]:
    """What one target rank has to do for its ``segments`` of ``state``.

    Returns:
        moves, sorted by their place in the source and joined where they continue each other, then
        draws.
    """
    moves: list[Move] = []
    draws: list[Draw] = []
    for name, segment in segments:
        same = _same_part(growth, source, target, name, state)
        if same is not None:
            moves += _flat_moves(source, same, segment, tensor_rank)
            continue
        local = target.layout.shapes[name]
        for part in interval_boxes(local, segment.start, segment.length):
            for piece in target.pieces(name, tensor_rank):
                held = part.meet(Box(piece.local, piece.box.shape))
                if held is None:
                    continue
                seen = held.move(piece.local, piece.box.low)
                for block in growth.blocks[name]:
                    box = seen.meet(block.box)
                    if box is None:
                        continue
                    inside = box.move(piece.box.low, piece.local)
                    place = _target_slice(segment, local, inside)
                    origin = block.sources[role_of(state)]
                    if isinstance(origin, Copy):
                        wanted = box.move(block.box.low, origin.low)
                        moves += _moves(source, origin, wanted, place, tensor_rank)
                    else:
                        draws.append(Draw(place, box.shape, origin, target.shapes[name], box))
    return [*_joined(moves), *draws]


def _same_part(
    growth: GrowthMap, source: Side, target: Side, name: str, state: State
) -> Copy | None:
    """The whole old parameter that this one is, if its ranks hold the same parts of both.

    Then nothing need be known of its shape: what depth growth does to all but fresh layers.
    """
    block, *others = growth.blocks[name]
    origin = block.sources[role_of(state)]
    if others or not isinstance(origin, Copy) or any(origin.low):
        return None
    if source.shapes[origin.parameter] != target.shapes[name]:
        return None
    same_cut = source.topology.tensor_size == target.topology.tensor_size
    return origin if same_cut or cut_dim(name) is None else None


def _flat_moves(source: Side, origin: Copy, segment: Segment, tensor_rank: int) -> Iterator[Move]:
    """Copies of a segment from the same elements of an old parameter."""
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
    source: Side, origin: Copy, wanted: Box, target: StridedSlice, tensor_rank: int
) -> Iterator[Move]:
    """Copies of the box ``wanted`` of an old parameter to the place ``target``."""
    name = origin.parameter
    local = source.layout.shapes[name]
    steps = strides_of(local)
    for rank in _holders(name, source.topology, tensor_rank):
        for piece in source.pieces(name, rank):
            box = wanted.meet(piece.box)
            if box is None:
                continue
            held = box.move(piece.box.low, piece.local)
            for segment in source.layout.overlapping(name, *held.span_in(local)):
                for part in interval_boxes(local, segment.start, segment.length):
                    overlap = part.meet(held)
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
    """Source tensor ranks to read from: all for a cut parameter, one for a replicated one."""
    if cut_dim(name) is None:
        return (tensor_rank % topology.tensor_size,)
    return range(topology.tensor_size)


def _joined(moves: list[Move]) -> list[Move]:
    """Moves in source order, flat ones that continue each other on both sides made one.

    A source layer may go to several places, so what a move continues need not stand before it.
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
    """Where a flat move stands on both sides after ``length`` elements."""
    return (
        move.tensor_rank,
        move.scale,
        move.source.container,
        move.source.offset + length,
        move.target.container,
        move.target.offset + length,
    )
