"""Where the optimizer state of each parameter lies, as intervals of flat buffers.

A ZeRO shard is a flat buffer without names, so the place of every parameter is derived from the
rules by which DeepSpeed cuts it.  Shapes here are those of one tensor-parallel rank; all
tensor-parallel ranks of a checkpoint share one layout.

A group with parameters a (5 elements) and b (4) on two data-parallel ranks::

    ZeRO-1, 2   one buffer of 9, padded to 12      rank 0: a0 a1 a2 a3 a4 b0
                and cut into halves                rank 1: b1 b2 b3  0  0  0
    ZeRO-3      each parameter is padded and       rank 0: a0 a1 a2 b0 b1
                cut into halves                    rank 1: a3 a4  0 b2 b3
"""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.state.optimizer_states import STATES as STATES
from lag_megatron.checkpoint.state.optimizer_states import Optimizer, state_shape, states_of
from lag_megatron.checkpoint.state.optimizer_states import State as State
from lag_megatron.checkpoint.state.segments import Container as Container
from lag_megatron.checkpoint.state.segments import EvenParts
from lag_megatron.checkpoint.state.segments import Segment as Segment

ParamGroup = Mapping[str, Shape]

DEFAULT_SUB_GROUP_SIZE = 1_000_000_000

# DeepSpeed aligns each flat group to this many elements a rank (nccl_start_alignment_factor).
_ALIGNMENT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """How a training state is sharded over ranks.

    Attributes:
        zero_stage: 0 to 3.
        data_size: data-parallel replicas.
        tensor_size: tensor-parallel ranks of a replica.
        precision: of the weights that the forward pass uses.
        sub_group_size: elements on a rank at which ZeRO-3 begins a new flat buffer.
    """

    zero_stage: int
    data_size: int
    tensor_size: int
    precision: Literal["fp32", "bf16", "fp16"]
    sub_group_size: int = DEFAULT_SUB_GROUP_SIZE


class Rank(TypedDict):
    """A rank of a topology."""

    tensor_rank: int
    data_rank: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Segments of every parameter, in flat order.

    Attributes:
        groups: names and shapes by parameter group, in DeepSpeed's order.
        segments: by parameter.
        lengths: length of each buffer, padding included.
        filled: elements of each buffer that belong to parameters; for ZeRO-3, whose padding lies
            between parameters, the same as ``lengths``.
        subgroups: ZeRO-3's buffers, as (parameter group, names) in the order of their keys.
        optimizer: the optimizer whose states these are.
        shapes: of every parameter, all groups together.
    """

    groups: Sequence[ParamGroup]
    segments: Mapping[str, tuple[Segment, ...]]
    lengths: Mapping[Container, int]
    filled: Mapping[Container, int]
    subgroups: Sequence[tuple[int, tuple[str, ...]]] = ()
    optimizer: Optimizer = "adamw"
    shapes: Mapping[str, Shape] = field(init=False)

    def __post_init__(self) -> None:
        shapes = {name: shape for group in self.groups for name, shape in group.items()}
        object.__setattr__(self, "shapes", shapes)

    @property
    def states(self) -> dict[State, "Layout"]:
        """The layout of each state that the optimizer keeps.

        AdamW's states have the weights' shapes.  Adafactor's have shapes of their own, and each
        parameter has some of them; buffers keep the parameters' numbers.
        """
        states = states_of(self.optimizer)
        return {state: self if state in STATES else self._reduced(state) for state in states}

    def _reduced(self, state: State) -> "Layout":
        groups = [
            {
                name: state_shape(state, shape)
                for name, shape in group.items()
                if state in states_of(self.optimizer, shape)
            }
            for group in self.groups
        ]
        segments: dict[str, tuple[Segment, ...]] = {}
        for name, shape in (item for group in groups for item in group.items()):
            (segment,) = self.segments[name]  # ZeRO-0 alone: see make_layout
            segments[name] = (replace(segment, length=numel(shape)),)
        lengths = {part.container: part.length for (part,) in segments.values()}
        return Layout(groups, segments, lengths, lengths)

    def keys(self, data_rank: int) -> list[int]:
        """Numbers of the buffers that a data-parallel rank holds."""
        return sorted(c.key for c in self.lengths if c.data_rank == data_rank)

    def segments_of_rank(self, data_rank: int) -> Iterator[tuple[str, Segment]]:
        """Every parameter's segments on one data-parallel rank."""
        if isinstance(self.segments, EvenParts):
            for name in self.segments:
                if (part := self.segments.on_rank(name, data_rank)) is not None:
                    yield name, part
            return
        for name, segments in self.segments.items():
            for segment in segments:
                if segment.container.data_rank == data_rank:
                    yield name, segment

    def overlapping(self, name: str, start: int, length: int) -> Iterator[Segment]:
        """The segments of a parameter that hold elements ``start .. start + length``, in order."""
        if isinstance(self.segments, EvenParts):
            yield from self.segments.overlapping(name, start, length)
            return
        parts = self.segments[name]
        first = bisect.bisect_right(parts, start, key=lambda part: part.start) - 1
        for part in itertools.islice(parts, max(first, 0), None):
            if part.start >= start + length:
                return
            yield part

    def buffers_of_rank(self, data_rank: int) -> dict[Container, tuple[tuple[str, Segment], ...]]:
        """The segments in each buffer of a data-parallel rank, in the order of its elements."""
        held: dict[Container, list[tuple[str, Segment]]] = {}
        for name, segment in self.segments_of_rank(data_rank):
            held.setdefault(segment.container, []).append((name, segment))
        return {
            container: tuple(sorted(held.get(container, ()), key=lambda part: part[1].offset))
            for container in sorted(self.lengths)
            if container.data_rank == data_rank
        }


@dataclass(frozen=True, slots=True)
class GroupState:
    """What the optimizer keeps for a whole parameter group.

    Attributes:
        settings: its hyper-parameters.
        counters: entries of its state that are not moments: the number of steps taken.
    """

    settings: Mapping[str, Any]
    counters: Mapping[str, Any]


def make_layout(
    groups: Sequence[ParamGroup], topology: Topology, optimizer: Optimizer = "adamw"
) -> Layout:
    """The layout that DeepSpeed gives these parameter groups under this topology.

    Raises:
        ValueError: for Adafactor's states on sharded parameters.
    """
    if optimizer == "adafactor" and (topology.zero_stage or topology.tensor_size > 1):
        raise ValueError(
            "Adafactor's means over rows and columns are those of whole matrices: they have no "
            f"place under ZeRO-{topology.zero_stage} with {topology.tensor_size} tensor-parallel "
            "ranks. Take ZeRO-0 and one."
        )
    if topology.zero_stage == 0:
        return replace(_unpartitioned(groups), optimizer=optimizer)
    if topology.zero_stage == 3:
        return _per_parameter(groups, topology)
    return _flat(groups, topology.data_size)


def frozen_layout(shapes: ParamGroup, topology: Topology) -> Layout:
    """The layout of parameters that are not trained; only ZeRO-3 shards them."""
    if topology.zero_stage != 3:
        return unsharded_layout(shapes)
    return _per_parameter([shapes], replace(topology, sub_group_size=1))


def unsharded_layout(shapes: Mapping[str, Shape]) -> Layout:
    """Every parameter whole, in a buffer of its own; buffers are numbered in order."""
    return _unpartitioned([shapes])


def _unpartitioned(groups: Sequence[ParamGroup]) -> Layout:
    segments: dict[str, tuple[Segment, ...]] = {}
    lengths: dict[Container, int] = {}
    for key, (name, shape) in enumerate(item for group in groups for item in group.items()):
        container = Container(0, key)
        lengths[container] = numel(shape)
        segments[name] = (Segment(0, numel(shape), container, 0),)
    return Layout(groups, segments, lengths, lengths)


def _flat(groups: Sequence[ParamGroup], data_size: int) -> Layout:
    """ZeRO-1 and 2: each group is one flat buffer, cut evenly whatever parameter lies there."""
    segments: dict[str, tuple[Segment, ...]] = {}
    lengths: dict[Container, int] = {}
    filled: dict[Container, int] = {}
    for key, group in enumerate(groups):
        total = sum(map(numel, group.values()))
        unit = _ALIGNMENT * data_size
        part = -(-total // unit) * unit // data_size
        for rank in range(data_size):
            lengths[Container(rank, key)] = part
            filled[Container(rank, key)] = min(max(total - rank * part, 0), part)
        begin = 0
        for name, shape in group.items():
            end = begin + numel(shape)
            segments[name] = tuple(
                Segment(
                    start=(low := max(begin, rank * part)) - begin,
                    length=min(end, (rank + 1) * part) - low,
                    container=Container(rank, key),
                    offset=low - rank * part,
                )
                for rank in range(begin // part, -(-end // part))
            )
            begin = end
    return Layout(groups, segments, lengths, filled)


def _per_parameter(groups: Sequence[ParamGroup], topology: Topology) -> Layout:
    """ZeRO-3: each parameter is cut evenly and padded; buffers are filled up to a size."""
    data_size = topology.data_size
    slots: dict[str, tuple[int, int, int]] = {}
    lengths: dict[Container, int] = {}
    subgroups = list(_split_groups(groups, topology))
    for key, (group, names) in enumerate(subgroups):
        offset = 0
        for name in names:
            size = numel(groups[group][name])
            slots[name] = (size, key, offset)
            offset += -(-size // data_size)
        lengths.update({Container(rank, key): offset for rank in range(data_size)})
    return Layout(groups, EvenParts(data_size, slots), lengths, lengths, subgroups)


def _split_groups(
    groups: Sequence[ParamGroup], topology: Topology
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """DeepSpeed's greedy rule: close a sub-group once it holds ``sub_group_size`` elements."""
    for number, group in enumerate(groups):
        names: list[str] = []
        held = 0
        for name, shape in group.items():
            names.append(name)
            held += -(-numel(shape) // topology.data_size)
            if held >= topology.sub_group_size:
                yield number, tuple(names)
                names, held = [], 0
        if names:
            yield number, tuple(names)
