"""Filling a laid-out file front to back, hashed on the way, through small buffers.

A mapped write costs a page fault for every page of the target, which is several times slower than
the copy itself; so values are made in a buffer that stays in the cache and written from there.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.atomic_io import flush_to_disk
from lag_megatron.checkpoint.state.region import Fill, Region
from lag_megatron.checkpoint.writer.checksums import ChecksumStream
from lag_megatron.checkpoint.writer.ordered_pool import OrderedPool

# Large enough that planning a piece costs little beside copying it, small enough for the cache.
PIECE_BYTES = 1 << 20
# Of a matrix whose rows become columns: whole ones are written in one run.
_BLOCK_BYTES = 1 << 22
_WINDOW_BYTES = 1 << 24
# One call of write with more gets the kernel to look for huge pages, which it may have to clear.
_WRITE_BYTES = 1 << 18
_BUFFERS_PER_THREAD = 2  # pieces that a thread may have begun
BUFFER_BYTES = (
    _BUFFERS_PER_THREAD * 2 * PIECE_BYTES
)  # that they take at most, where nothing is turned

ProgressFn = Callable[[int], object]
FlushFn = Callable[[Path], object]


class ThreadBuffers(threading.local):
    """A thread's buffers by purpose, for each piece that it may have begun.

    Where they outlast a file, a small one does not wait for fresh pages, which take longer than its
    values do.
    """

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = [{} for _ in range(_BUFFERS_PER_THREAD)]


@dataclass(frozen=True, slots=True)
class WriteContext:
    """Who is with a writer of files.

    Attributes:
        told: told the number of bytes after each piece.
        flush: called with each finished file, to bring it to the disk.
        join: while it is open, others that have nothing to do call what it is given, too.
        rooms: buffers for several files; each makes its own without.
    """

    told: ProgressFn = lambda count: None
    flush: FlushFn = flush_to_disk
    join: Callable[[Callable[[], None]], AbstractContextManager[object]] = nullcontext
    rooms: ThreadBuffers | None = None


DEFAULT_CONTEXT = WriteContext()


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
class _ByteRange:
    """A run of bytes of a file.

    Attributes:
        offset: where they begin.
        end: where they end.
        span: what they belong to; None for bytes that are there already and are only hashed.
        region: their values.
        first: of a matrix too large to turn at once, the first of the rows in ``region``; it is
            hashed behind them.
    """

    offset: int
    end: int
    span: Span | None = None
    region: Region | None = None
    first: int | None = None


_Piece = Sequence[_ByteRange]  # what one thread writes at a time: neighbours, or one alone


def write_spans(
    path: Path, spans: Sequence[Span], fill: Fill, crew: WriteContext = DEFAULT_CONTEXT
) -> dict[str, Any]:
    """Write every span and leave all other bytes as they are; flushing is the caller's.

    Args:
        path: a file that has its final size.
        spans: without overlap.
        fill: makes the values of a region.
        crew: told of each piece; it helps where there is much to write.

    Returns:
        the file's manifest entry: size and xxh3-128 checksum, and those of each state where there
        are several.
    """
    with opened(path, os.O_RDWR) as file:
        return fill_file(file, spans, fill, crew)


def fill_file(file: int, spans: Sequence[Span], fill: Fill, crew: WriteContext) -> dict[str, Any]:
    """The same for the descriptor of a file, open for reading and writing."""
    parts = _parts(sorted(spans, key=lambda s: s.offset), os.fstat(file).st_size, fill)
    relay, trail = (
        OrderedPool(_pieces(parts)),
        ChecksumStream(file, (span.region.state for span in spans)),
    )
    rooms = crew.rooms or ThreadBuffers()

    def run() -> None:
        relay.run([_Writer(file, fill, crew.told, trail, room).write for room in rooms.kept])

    is_long = sum(span.end - span.offset for span in spans) > _WINDOW_BYTES
    with crew.join(run) if is_long else nullcontext():
        run()
    return trail.entry


def write_image(
    file: int, image: bytearray, spans: Sequence[Span], fill: Fill, crew: WriteContext
) -> dict[str, Any]:
    """The same for an empty file so small that ``image`` is all of it, but for the values."""
    trail = ChecksumStream(file, (span.region.state for span in spans))
    data, view, at = torch.frombuffer(image, dtype=torch.uint8), memoryview(image), 0
    for span in sorted(spans, key=lambda s: s.offset):
        fill.expect(span.region)
        fill(span.region, data[span.offset : span.end].view(span.dtype))
        trail.hash(view[at : span.offset], at)
        trail.hash(view[span.offset : span.end], span.offset, span.region.state)
        at = span.end
    trail.hash(view[at:], at)
    put(file, view, 0)
    crew.told(sum(span.end - span.offset for span in spans))
    return trail.entry


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """The descriptor of a file: Python's own objects ask the system more, once for each file."""
    file = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def put(file: int, data: memoryview, offset: int) -> None:
    """Write all of it, which a single system call need not do."""
    while data:
        count = os.pwrite(file, data[:_WRITE_BYTES], offset)
        data, offset = data[count:], offset + count


def _pieces(parts: Iterator[_ByteRange]) -> Iterator[_Piece]:
    """Parts put together until they are worth a thread's while."""
    piece: list[_ByteRange] = []
    for part in parts:
        is_value = part.span is not None and part.first is None
        if piece and not is_value:
            yield piece
            piece = []
        piece.append(part)
        if not is_value or part.end - piece[0].offset >= PIECE_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece


def _parts(spans: Sequence[Span], size: int, fill: Fill) -> Iterator[_ByteRange]:
    """Everything of a file in order; what it needs is asked for some parts ahead."""
    at = 0
    for span in spans:
        if span.offset > at:
            yield _ByteRange(at, span.offset)
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
                yield _ByteRange(at, end, span, region)
                at = end
    if size > at:
        yield _ByteRange(at, size)


def _rows(span: Span, fill: Fill) -> Iterator[_ByteRange]:
    """A matrix whose rows lie as columns: all of it, or some rows at a time."""
    rows = max(1, _BLOCK_BYTES // (span.width * span.dtype.itemsize))
    if rows * span.width >= span.region.length:
        fill.expect(span.region)
        yield _ByteRange(span.offset, span.end, span, span.region)
        return
    for number, region in enumerate(span.region.pieces(rows * span.width)):
        fill.expect(region)
        yield _ByteRange(span.offset, span.offset, span, region, number * rows)
    yield _ByteRange(span.offset, span.end)


class _Writer:
    """Makes and writes a piece at a time, in buffers of its own."""

    def __init__(
        self,
        file: int,
        fill: Fill,
        told: ProgressFn,
        trail: ChecksumStream,
        rooms: dict[str, Tensor],
    ) -> None:
        self._file, self._fill, self._told, self._trail = file, fill, told, trail
        self._rooms = rooms

    def write(self, piece: _Piece) -> Callable[[], None]:
        """Make a piece and write it; what is returned hashes it."""
        begin, end = piece[0].offset, piece[-1].end
        if piece[0].span is None:
            return partial(self._trail.hash_file, begin, end)
        if piece[0].first is not None:
            self._write_rows(piece[0])
            return lambda: None
        data = self._room("piece", end - begin)
        for part in piece:
            self._make(part, data[part.offset - begin : part.end - begin])
        put(self._file, _bytes_of(data), begin)
        self._told(end - begin)
        return partial(self._hash, piece, _bytes_of(data))

    def _hash(self, piece: _Piece, data: memoryview) -> None:
        begin = piece[0].offset
        for part in piece:
            assert part.region is not None
            mine = data[part.offset - begin : part.end - begin]
            self._trail.hash(mine, part.offset, part.region.state)

    def _make(self, part: _ByteRange, data: Tensor) -> None:
        span, region = part.span, part.region
        assert span is not None
        assert region is not None
        values = data.view(span.dtype)
        if not span.width:
            self._fill(region, values)
            return
        rows = self._room("rows", len(data)).view(span.dtype)
        self._fill(region, rows)
        values.view(span.width, -1).copy_(rows.view(-1, span.width).t())

    def _write_rows(self, part: _ByteRange) -> None:
        """Write some rows of a matrix as parts of its columns."""
        span, region = part.span, part.region
        assert span is not None
        assert region is not None
        size = span.dtype.itemsize
        data = self._room("piece", region.length * size)
        self._make(part, data)
        run, stride = len(data) // span.width, span.region.length // span.width * size
        begin, view = span.offset + (part.first or 0) * size, _bytes_of(data)
        for number in range(span.width):
            put(self._file, view[number * run : (number + 1) * run], begin + number * stride)
        self._told(len(data))

    def _room(self, name: str, size: int) -> Tensor:
        """Room for so many bytes; it is used again for each piece."""
        if name not in self._rooms or len(self._rooms[name]) < size:
            self._rooms[name] = torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8)
        return self._rooms[name][:size]


def _bytes_of(values: Tensor) -> memoryview:
    return memoryview(values.numpy())  # type: ignore[arg-type]
