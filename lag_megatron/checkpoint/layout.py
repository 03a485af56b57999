"""Where the optimizer state of each parameter lies, as flat intervals.

A ZeRO shard is a flat buffer without names, so the place of every parameter has to be derived from
the same rules that DeepSpeed cut it by.  Shapes here are those of one tensor-parallel rank; all
tensor-parallel ranks of a checkpoint share one layout.
"""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

from lag_megatron.checkpoint.boxes import Shape, numel

State = Literal["fp32", "exp_avg", "exp_avg_sq"]
STATES: tuple[State, ...] = ("fp32", "exp_avg", "exp_avg_sq")

Group = Mapping[str, Shape]

DEFAULT_SUB_GROUP_SIZE = 1_000_000_000

# DeepSpeed aligns each flat group to this many elements a rank (nccl_start_alignment_factor).
_ALIGNMENT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """How a training state is spread over ranks.

    Attributes:
        zero_stage: 0 to 3.
        data_size: data-parallel replicas.
        tensor_size: tensor-parallel ranks of a replica.
        precision: of the weights that the forward pass uses.
        sub_group_size: elements a rank at which ZeRO-3 begins a new flat buffer.
    """

    zero_stage: int
    data_size: int
    tensor_size: int
    precision: Literal["fp32", "bf16", "fp16"]
    sub_group_size: int = DEFAULT_SUB_GROUP_SIZE


class Rank(TypedDict):
    """Which rank of a topology."""

    tensor_rank: int
    data_rank: int


@dataclass(frozen=True, slots=True, order=True)
class Container:
    """A flat buffer of optimizer state: one for each of fp32, exp_avg and exp_avg_sq.

    ``key`` is DeepSpeed's number of it: the parameter group (ZeRO-1 and 2), the sub-group
    (ZeRO-3), or the parameter (ZeRO-0).
    """

    data_rank: int
    key: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements ``start .. start + length`` of a flattened parameter, at ``offset`` of a buffer."""

    start: int
    length: int
    container: Container
    offset: int


@dataclass(frozen=True, slots=True)
class EvenParts(Mapping[str, tuple[Segment, ...]]):
    """ZeRO-3's segments, computed when asked for: a list would grow with the number of ranks.

    Attributes:
        data_size: ranks that each parameter is cut into.
        slots: by parameter: its size, and the number and offset of its part in every rank's buffer.
    """

    data_size: int
    slots: Mapping[str, tuple[int, int, int]]

    def __getitem__(self, name: str) -> tuple[Segment, ...]:
        size = self.slots[name][0]
        return tuple(self.overlapping(name, 0, size)) if size else ()

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def overlapping(self, name: str, start: int, length: int) -> Iterator[Segment]:
        """The segments that hold elements ``start .. start + length``, in order."""
        part = -(-self.slots[name][0] // self.data_size)
        for rank in range(start // part, (start + length - 1) // part + 1):
            if (segment := self.on_rank(name, rank)) is not None:
                yield segment

    def on_rank(self, name: str, rank: int) -> Segment | None:
        """A rank's segment; the last ranks may have none."""
        size, key, offset = self.slots[name]
        part = -(-size // self.data_size)
        start = rank * part
        if start >= size:
            return None
        return Segment(start, min(part, size - start), Container(rank, key), offset)


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
        shapes: of every parameter, all groups together.
    """

    groups: Sequence[Group]
    segments: Mapping[str, tuple[Segment, ...]]
    lengths: Mapping[Container, int]
    filled: Mapping[Container, int]
    subgroups: Sequence[tuple[int, tuple[str, ...]]] = ()
    shapes: Mapping[str, Shape] = field(init=False)

    def __post_init__(self) -> None:
        shapes = {name: shape for group in self.groups for name, shape in group.items()}
        object.__setattr__(self, "shapes", shapes)

    def keys(self, data_rank: int) -> list[int]:
        """Numbers of the buffers that a data-parallel rank holds."""
        return sorted(c.key for c in self.lengths if c.data_rank == data_rank)

    def of_rank(self, data_rank: int) -> Iterator[tuple[str, Segment]]:
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

    def held(self, data_rank: int) -> dict[Container, tuple[tuple[str, Segment], ...]]:
        """What each buffer of a data-parallel rank holds, in the order of its elements."""
        held: dict[Container, list[tuple[str, Segment]]] = {}
        for name, segment in self.of_rank(data_rank):
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
        counters: entries of its state beside the moments: the number of steps taken.
    """

    settings: Mapping[str, Any]
    counters: Mapping[str, Any]


def make_layout(groups: Sequence[Group], topology: Topology) -> Layout:
    """The layout that DeepSpeed gives these parameter groups under this topology."""
    if topology.zero_stage == 0:
        return _unpartitioned(groups)
    if topology.zero_stage == 3:
        return _per_parameter(groups, topology)
    return _flat(groups, topology.data_size)


def frozen_layout(shapes: Group, topology: Topology) -> Layout:
    """Where parameters that are not trained lie: whole, or under ZeRO-3 each cut evenly."""
    if topology.zero_stage != 3:
        return whole_parameters(shapes)
    return _per_parameter([shapes], replace(topology, sub_group_size=1))


def whole_parameters(shapes: Mapping[str, Shape]) -> Layout:
    """Every parameter in a buffer of its own, numbered in order."""
    return _unpartitioned([shapes])


def _unpartitioned(groups: Sequence[Group]) -> Layout:
    segments: dict[str, tuple[Segment, ...]] = {}
    lengths: dict[Container, int] = {}
    for key, (name, shape) in enumerate(item for group in groups for item in group.items()):
        container = Container(0, key)
        lengths[container] = numel(shape)
        segments[name] = (Segment(0, numel(shape), container, 0),)
    return Layout(groups, segments, lengths, lengths)


def _flat(groups: Sequence[Group], data_size: int) -> Layout:
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


def _per_parameter(groups: Sequence[Group], topology: Topology) -> Layout:
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
    groups: Sequence[Group], topology: Topology
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
