"""Filling a laid-out file front to back, hashed on the way, through small buffers.

A mapped write costs a page fault for every page of the target, which is several times slower than
the copy itself; so values are made in a buffer that stays in the cache and written from there.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from lag_megatron.checkpoint.paging import write_behind
from lag_megatron.checkpoint.regions import Fill, Region
from lag_megatron.checkpoint.relay import Relay
from lag_megatron.files import flush_to_disk

# Large enough that planning a piece costs little beside copying it, small enough for the cache.
PIECE_BYTES = 1 << 20
# Of a matrix whose rows become columns: whole ones are written in one run.
_BLOCK_BYTES = 1 << 22
_WINDOW_BYTES = 1 << 24
# One call of write with more gets the kernel to look for huge pages, which it may have to clear.
_WRITE_BYTES = 1 << 18
_GAP_BYTES = 1 << 16

Told = Callable[[int], object]
Flush = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Crew:
    """Who is with a writer of files.

    Attributes:
        told: told the number of bytes after each piece.
        flush: called with each finished file, to bring it to the disk.
        join: while it is open, others that have nothing to do call what it is given, too.
    """

    told: Told = lambda count: None
    flush: Flush = flush_to_disk
    join: Callable[[Callable[[], None]], AbstractContextManager[object]] = nullcontext


ALONE = Crew()


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of a file, from ``offset``, that a region takes in ``dtype``.

    ``width`` is 0, or the region is a matrix with rows of so many elements that lie as columns.
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
class _Piece:
    """What one thread writes at a time.

    Attributes:
        span: what it belongs to; None for bytes that are there already and are only hashed.
        region: its values.
        offset: where the bytes begin that are hashed, for which there is no later piece.
        end: where they end.
        first: the first row, of a matrix whose rows lie as columns.
    """

    span: Span | None
    region: Region | None
    offset: int
    end: int
    first: int = 0


def write_spans(
    path: Path, spans: Sequence[Span], fill: Fill, crew: Crew = ALONE
) -> dict[str, Any]:
    """Write every span and leave all other bytes as they are; flushing is the caller's.

    Args:
        path: a file that has its final size.
        spans: without overlap.
        fill: makes the values of a region.
        crew: told of each piece; it helps where there is much to write.

    Returns:
        the file's manifest entry: size and xxh3-128 checksum.
    """
    with path.open("r+b", buffering=0) as file:
        handle = file.fileno()
        size = os.fstat(handle).st_size
        relay = Relay(_pieces(sorted(spans, key=lambda s: s.offset), size, fill))
        trail = _Trail(handle)

        def run() -> None:
            relay.run(_Writer(handle, fill, crew.told, trail).write)

        is_long = sum(span.end - span.offset for span in spans) > _WINDOW_BYTES
        with crew.join(run) if is_long else nullcontext():
            run()
    return {"size": size, "xxh3_128": trail.digest.hexdigest()}


def _pieces(spans: Sequence[Span], size: int, fill: Fill) -> Iterator[_Piece]:
    """Everything of a file in order; what it needs is asked for some pieces ahead."""
    at = 0
    for span in spans:
        yield _Piece(None, None, at, span.offset)
        at = span.offset
        width = span.dtype.itemsize
        if span.width:
            yield from _rows(span, fill)
            at = span.end
            continue
        for window in span.region.pieces(_WINDOW_BYTES // width):
            fill.expect(window)
            for region in window.pieces(PIECE_BYTES // width):
                end = at + region.length * width
                yield _Piece(span, region, at, end)
                at = end
    yield _Piece(None, None, at, size)


def _rows(span: Span, fill: Fill) -> Iterator[_Piece]:
    """Rows of a matrix, which are hashed at last where they are no run of bytes."""
    rows = max(1, _BLOCK_BYTES // (span.width * span.dtype.itemsize))
    if rows * span.width >= span.region.length:
        fill.expect(span.region)
        yield _Piece(span, span.region, span.offset, span.end)
        return
    for number, region in enumerate(span.region.pieces(rows * span.width)):
        fill.expect(region)
        yield _Piece(span, region, span.offset, span.offset, number * rows)
    yield _Piece(None, None, span.offset, span.end)


class _Trail:
    """What is behind the threads that fill a file: its checksum, and pages on their way."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._begun = 0
        self.digest = xxhash.xxh3_128()

    def hash(self, data: memoryview, end: int) -> None:
        """Go on with the bytes up to ``end``."""
        self.digest.update(data)
        if end - self._begun >= _WINDOW_BYTES:
            write_behind(self._file, self._begun, end - self._begun)
            self._begun = end

    def hash_file(self, start: int, end: int) -> None:
        """Go on with what stands there: an archive's own records, small tensors, columns."""
        while start < end:
            data = os.pread(self._file, min(_GAP_BYTES, end - start), start)
            if not data:
                raise OSError(f"the file ended at byte {start}, expected {end}")
            start += len(data)
            self.hash(memoryview(data), start)


class _Writer:
    """One thread's buffers."""

    def __init__(self, file: int, fill: Fill, told: Told, trail: _Trail) -> None:
        self._file, self._fill, self._told, self._trail = file, fill, told, trail
        self._rooms: dict[str, Tensor] = {}

    def write(self, piece: _Piece) -> Callable[[], None]:
        """Make a piece and write it; what is returned hashes it."""
        if piece.span is None or piece.region is None:
            return partial(self._trail.hash_file, piece.offset, piece.end)
        values = self._room("made", piece.region.length, piece.span.dtype)
        self._fill(piece.region, values)
        if piece.span.width:
            values = self._turned(piece, values)
        data = _bytes_of(values)
        if piece.end > piece.offset:
            self._put(data, piece.offset)
        self._told(len(data))
        return partial(self._trail.hash, data[: piece.end - piece.offset], piece.end)

    def _turned(self, piece: _Piece, values: Tensor) -> Tensor:
        """The columns of a piece's matrix; those of a part of it are written at once."""
        span = piece.span
        assert span is not None
        count = len(values) // span.width
        columns = self._room("turned", len(values), span.dtype).view(span.width, count)
        columns.copy_(values.view(count, span.width).t())
        if piece.end == piece.offset:
            size = span.dtype.itemsize
            stride = span.region.length // span.width * size
            data, begin = _bytes_of(columns.view(-1)), span.offset + piece.first * size
            for number in range(span.width):
                run = data[number * count * size : (number + 1) * count * size]
                self._put(run, begin + number * stride)
        return columns.view(-1)

    def _room(self, name: str, length: int, dtype: torch.dtype) -> Tensor:
        """Room for so many elements; it is used again for each piece."""
        size = length * dtype.itemsize
        if name not in self._rooms or len(self._rooms[name]) < size:
            self._rooms[name] = torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8)
        return self._rooms[name][:size].view(dtype)

    def _put(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._file, data[:_WRITE_BYTES], offset)
            data, offset = data[count:], offset + count


def _bytes_of(values: Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
