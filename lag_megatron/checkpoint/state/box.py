"""Axis-aligned boxes of arrays, and the intervals that they cover in row-major order."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


def numel(shape: Sequence[int]) -> int:
    """Number of elements."""
    return math.prod(shape)


def strides_of(shape: Shape) -> Shape:
    """Row-major strides in elements."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


@dataclass(frozen=True, slots=True)
class Box:
    """The elements from corner ``low``, ``shape`` of them along each dimension."""

    low: Shape
    shape: Shape

    def intersect(self, other: "Box") -> "Box | None":
        """The box that both cover, or None."""
        low = tuple(map(max, self.low, other.low))
        high = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.low, self.shape, other.low, other.shape, strict=True)
        )
        if any(h <= a for a, h in zip(low, high, strict=True)):
            return None
        return Box(low, tuple(h - a for a, h in zip(low, high, strict=True)))

    def move(self, old: Shape, new: Shape) -> "Box":
        """The same box in coordinates where the point ``old`` is ``new``."""
        low = tuple(a - o + n for a, o, n in zip(self.low, old, new, strict=True))
        return Box(low, self.shape)

    def offset_in(self, shape: Shape) -> int:
        """Row-major position of the corner in an array of ``shape``."""
        return sum(a * s for a, s in zip(self.low, strides_of(shape), strict=True))

    def span_in(self, shape: Shape) -> tuple[int, int]:
        """Row-major position of the first element, and the number of elements up to the last."""
        last = sum((n - 1) * s for n, s in zip(self.shape, strides_of(shape), strict=True))
        return self.offset_in(shape), last + 1


def full_box(shape: Shape) -> Box:
    """The box that covers an array."""
    return Box((0,) * len(shape), shape)


def interval_boxes(shape: Shape, start: int, length: int) -> Iterator[Box]:
    """Split a row-major interval of an array into at most ``2 * ndim - 1`` boxes, in order."""
    if length <= 0:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (length,) * len(shape))
        return
    row = numel(shape[1:])
    first, begin = divmod(start, row)
    last, end = divmod(start + length, row)
    if first == last:
        yield from _row(shape, first, begin, length)
        return
    if begin:
        yield from _row(shape, first, begin, row - begin)
        first += 1
    if last > first:
        yield Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    if end:
        yield from _row(shape, last, 0, end)


def _row(shape: Shape, row: int, start: int, length: int) -> Iterator[Box]:
    for box in interval_boxes(shape[1:], start, length):
        yield Box((row, *box.low), (1, *box.shape))


def collapse(shape: Shape, *strides: Shape) -> tuple[Shape, tuple[Shape, ...]]:
    """Merge dimensions that can be walked as one, for all arrays alike.

    Args:
        shape: extents.
        strides: one tuple of strides for each array.

    Returns:
        the merged extents, and the merged strides of each array.
    """
    dims: list[tuple[int, tuple[int, ...]]] = []
    for extent, *steps in zip(shape, *strides, strict=True):
        if extent == 1:
            continue
        if dims and all(
            outer == inner * extent for outer, inner in zip(dims[-1][1], steps, strict=True)
        ):
            dims[-1] = (dims[-1][0] * extent, tuple(steps))
        else:
            dims.append((extent, tuple(steps)))
    dims = dims or [(1, (1,) * len(strides))]
    return (
        tuple(extent for extent, _ in dims),
        tuple(tuple(steps[i] for _, steps in dims) for i in range(len(strides))),
    )
