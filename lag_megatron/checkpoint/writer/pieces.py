"""A file cut into pieces of about 1 MiB, front to back: what one thread writes at a time.

A ZeRO-1 shard of 4,801,500 bytes with two buffers of 600,000 fp32 elements becomes nine pieces::

    bytes                     what                      piece
            0 .. 768          zip header, pickle        0  only hashed: torch has written it
          768 .. 1,049,344    masters, 262,144 values   1
    1,049,344 .. 2,097,920    masters, 262,144 values   2
    2,097,920 .. 2,400,768    masters, the last 75,712  3
    2,400,768 .. 2,400,832    zip record                4  only hashed
    2,400,832 .. 3,449,408    exp_avg                   5
    ...
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lag_megatron.checkpoint.state.region import Region, RegionFiller

# Large enough that planning a piece costs little beside copying it, small enough for the cache.
PIECE_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 24  # read from disk ahead of the pieces
# Of a matrix to transpose: a smaller one is transposed at once and written in one run.
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of a file that a region's values take, from ``offset`` on.

    Attributes:
        offset: of the first byte.
        dtype: in which the values are stored.
        region: the values.
        width: 0, or elements of a row of a matrix that is stored transposed.
    """

    offset: int
    dtype: torch.dtype
    region: Region
    width: int = 0

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.region.length * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A run of bytes of a file.

    Attributes:
        offset: of the first byte.
        end: the first byte after it.
        span: what the bytes belong to; None for bytes that are only hashed.
        region: their values.
        first_row: for some rows of a matrix too large to transpose at once, the number of the
            first; they lie scattered over the span, which is hashed after all of them.
    """

    offset: int
    end: int
    span: Span | None = None
    region: Region | None = None
    first_row: int | None = None


Piece = Sequence[ByteRange]  # neighbours in the file, or one range alone


def file_pieces(spans: Sequence[Span], size: int, fill: RegionFiller) -> Iterator[Piece]:
    """All pieces of a file of ``size`` bytes, in order; ``fill`` is asked to read ahead of them.

    Args:
        spans: the values of the file, without overlap.
        size: bytes of the file.
        fill: what will make the values.
    """
    piece: list[ByteRange] = []
    for part in _ranges(sorted(spans, key=lambda s: s.offset), size, fill):
        is_value = part.span is not None and part.first_row is None
        if piece and not is_value:
            yield piece
            piece = []
        piece.append(part)
        if not is_value or part.end - piece[0].offset >= PIECE_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece


def _ranges(spans: Sequence[Span], size: int, fill: RegionFiller) -> Iterator[ByteRange]:
    at = 0
    for span in spans:
        if span.offset > at:
            yield ByteRange(at, span.offset)
        at = span.offset
        itemsize = span.dtype.itemsize
        if span.width:
            yield from _transposed_ranges(span, fill)
            at = span.end
            continue
        for window in span.region.pieces(_WINDOW_BYTES // itemsize):
            fill.prefetch(window)
            for region in window.pieces(PIECE_BYTES // itemsize):
                end = at + region.length * itemsize
                yield ByteRange(at, end, span, region)
                at = end
    if size > at:
        yield ByteRange(at, size)


def _transposed_ranges(span: Span, fill: RegionFiller) -> Iterator[ByteRange]:
    """A matrix that is stored transposed: all of it, or some rows at a time."""
    rows = max(1, _BLOCK_BYTES // (span.width * span.dtype.itemsize))
    if rows * span.width >= span.region.length:
        fill.prefetch(span.region)
        yield ByteRange(span.offset, span.end, span, span.region)
        return
    for number, region in enumerate(span.region.pieces(rows * span.width)):
        fill.prefetch(region)
        yield ByteRange(span.offset, span.offset, span, region, number * rows)
    yield ByteRange(span.offset, span.end)
