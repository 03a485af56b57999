"""Intervals of parameters in flat buffers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Container:
    """Which flat buffer of optimizer state; there is one such buffer for each state.

    ``key`` is DeepSpeed's number of the buffer: the parameter group (ZeRO-1 and 2), the sub-group
    (ZeRO-3), or the parameter (ZeRO-0).
    """

    data_rank: int
    key: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements ``start .. start + length`` of a flat parameter, at ``offset`` in a buffer."""

    start: int
    length: int
    container: Container
    offset: int


@dataclass(frozen=True, slots=True)
class EvenParts(Mapping[str, tuple[Segment, ...]]):
    """ZeRO-3's segments, computed on access: a list would grow with the number of ranks.

    Attributes:
        data_size: ranks over which each parameter is sharded.
        slots: by parameter: its size, its buffer's key, and its part's offset in that buffer, the
            same on every rank.
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
        """A rank's segment; None on last ranks that have padding alone."""
        size, key, offset = self.slots[name]
        part = -(-size // self.data_size)
        start = rank * part
        if start >= size:
            return None
        return Segment(start, min(part, size - start), Container(rank, key), offset)
