"""Regions: runs of elements for which a writer needs the values."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from lag_megatron.checkpoint.state.layout import Segment, State


@dataclass(frozen=True, slots=True)
class Region:
    """A run of elements to be filled: a buffer of optimizer state, a weight, or a part of one.

    Attributes:
        state: which state; 16-bit weights are ``fp32`` in the precision of the target buffer.
        segments: parameters' intervals in increasing order, with ``offset`` counted from the
            beginning of the region.  Elements between them are padding and become 0.
        length: elements.
        trained: whether the optimizer has these parameters; the others have weights alone.
        forward: whether these are the weights of the forward pass, not the fp32 masters.
    """

    state: State
    segments: tuple[tuple[str, Segment], ...]
    length: int
    trained: bool = True
    forward: bool = False

    def pieces(self, size: int) -> Iterator["Region"]:
        """Cut the region into parts of at most ``size`` elements, in order."""
        first = 0
        for begin in range(0, self.length, size):
            end = min(begin + size, self.length)
            held: list[tuple[str, Segment]] = []
            while first < len(self.segments):
                name, segment = self.segments[first]
                low = max(segment.offset, begin)
                high = min(segment.offset + segment.length, end)
                if low < high:
                    start = segment.start + low - segment.offset
                    part = replace(segment, start=start, length=high - low, offset=low - begin)
                    held.append((name, part))
                if segment.offset + segment.length > end:
                    break
                first += 1
            yield replace(self, segments=tuple(held), length=end - begin)


class RegionFiller(Protocol):
    """Makes the values of regions: copied, scaled or drawn."""

    def prefetch(self, region: Region) -> None:
        """Start to read what the region needs; it is filled soon."""

    def __call__(self, region: Region, buffer: Tensor) -> None:
        """Write the region's values into a flat buffer of its length, in any precision."""
