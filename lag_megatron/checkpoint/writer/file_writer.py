"""Filling the values of a laid-out file through small buffers, with checksums on the way.

Values are made in a buffer that stays in the CPU's cache and written from there with ``pwrite``:
a write through ``mmap`` costs a page fault for every page, several times the copy itself.  The
steps for each piece of the file (``pieces`` shows how a file is cut)::

    fill(region, buffer)    copy, scale or draw the values         any thread, any order
    pwrite(buffer, offset)                                         any thread, any order
    checksums.hash(buffer)  xxh3 of the file and of each state     one piece after the other

A matrix that is stored transposed (GPT-2's ``Conv1D``) takes one step more: rows go to a second
buffer and are copied into columns.  With more than 4 MiB, a block of rows at a time is written as
short runs of every column, and the whole span is read back for its checksum.  For example 3 rows of
a matrix of 6 x 2 (``width`` 2, 4 bytes an element) become two runs of 12 bytes, 24 bytes apart.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.state.region import RegionFiller
from lag_megatron.checkpoint.writer.checksums import ChecksumStream
from lag_megatron.checkpoint.writer.context import (
    DEFAULT_CONTEXT,
    ProgressFn,
    ThreadBuffers,
    WriteContext,
)
from lag_megatron.checkpoint.writer.ordered_pool import OrderedPool
from lag_megatron.checkpoint.writer.pieces import PIECE_BYTES, ByteRange, Piece, Span, file_pieces

_SHARED_BYTES = 1 << 24  # a file with more values is worth several threads
# With more bytes in one call the kernel looks for huge pages, which it may have to clear.
_WRITE_BYTES = 1 << 18


def write_spans(
    path: Path, spans: Sequence[Span], fill: RegionFiller, context: WriteContext = DEFAULT_CONTEXT
) -> dict[str, Any]:
    """Write every span and leave all other bytes as they are; the caller flushes the file.

    Args:
        path: a file that has its final size.
        spans: without overlap.
        fill: makes the values of a region.
        context: callbacks and buffers.

    Returns:
        the file's manifest entry: size and xxh3-128 checksum, and a checksum of each state where
        there are several.

    Raises:
        OSError: if the disk is full or fails.
    """
    with opened(path, os.O_RDWR) as file:
        return fill_file(file, spans, fill, context)


def fill_file(
    file: int, spans: Sequence[Span], fill: RegionFiller, context: WriteContext
) -> dict[str, Any]:
    """``write_spans`` for the descriptor of a file that is open for reading and writing."""
    pool = OrderedPool(file_pieces(spans, os.fstat(file).st_size, fill))
    checksums = ChecksumStream(file, (span.region.state for span in spans))
    thread_buffers = context.buffers or ThreadBuffers()

    def run() -> None:
        pool.run(
            [
                _PieceWriter(file, fill, context.progress, checksums, buffers).write
                for buffers in thread_buffers.kept
            ]
        )

    is_long = sum(span.end - span.offset for span in spans) > _SHARED_BYTES
    with context.share_work(run) if is_long else nullcontext():
        run()
    return checksums.entry


def write_image(
    file: int, image: bytearray, spans: Sequence[Span], fill: RegionFiller, context: WriteContext
) -> dict[str, Any]:
    """Write a small file from memory: ``image`` is all of it, with the values still to be made."""
    checksums = ChecksumStream(file, (span.region.state for span in spans))
    data, view, at = torch.frombuffer(image, dtype=torch.uint8), memoryview(image), 0
    for span in sorted(spans, key=lambda s: s.offset):
        fill.prefetch(span.region)
        fill(span.region, data[span.offset : span.end].view(span.dtype))
        checksums.hash(view[at : span.offset], at)
        checksums.hash(view[span.offset : span.end], span.offset, span.region.state)
        at = span.end
    checksums.hash(view[at:], at)
    put(file, view, 0)
    context.progress(sum(span.end - span.offset for span in spans))
    return checksums.entry


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """The descriptor of a file; Python's own file objects cost further system calls a file."""
    file = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def put(file: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``, which may take several system calls."""
    while data:
        count = os.pwrite(file, data[:_WRITE_BYTES], offset)
        data, offset = data[count:], offset + count


class _PieceWriter:
    """Makes and writes one piece at a time, in one set of buffers."""

    def __init__(
        self,
        file: int,
        fill: RegionFiller,
        progress: ProgressFn,
        checksums: ChecksumStream,
        buffers: dict[str, Tensor],
    ) -> None:
        self._file, self._fill, self._progress, self._checksums = file, fill, progress, checksums
        self._buffers = buffers

    def write(self, piece: Piece) -> Callable[[], None]:
        """Make a piece and write it; the returned function hashes it."""
        begin, end = piece[0].offset, piece[-1].end
        if piece[0].span is None:
            return partial(self._checksums.hash_file, begin, end)
        if piece[0].first_row is not None:
            self._write_rows(piece[0])
            return lambda: None
        data = self._buffer("piece", end - begin)
        for part in piece:
            self._make(part, data[part.offset - begin : part.end - begin])
        put(self._file, _bytes_of(data), begin)
        self._progress(end - begin)
        return partial(self._hash, piece, _bytes_of(data))

    def _hash(self, piece: Piece, data: memoryview) -> None:
        begin = piece[0].offset
        for part in piece:
            assert part.region is not None
            mine = data[part.offset - begin : part.end - begin]
            self._checksums.hash(mine, part.offset, part.region.state)

    def _make(self, part: ByteRange, data: Tensor) -> None:
        span, region = part.span, part.region
        assert span is not None
        assert region is not None
        values = data.view(span.dtype)
        if not span.width:
            self._fill(region, values)
            return
        rows = self._buffer("rows", len(data)).view(span.dtype)
        self._fill(region, rows)
        values.view(span.width, -1).copy_(rows.view(-1, span.width).t())

    def _write_rows(self, part: ByteRange) -> None:
        """Write some rows of a matrix as runs of its columns."""
        span, region = part.span, part.region
        assert span is not None
        assert region is not None
        size = span.dtype.itemsize
        data = self._buffer("piece", region.length * size)
        self._make(part, data)
        run, stride = len(data) // span.width, span.region.length // span.width * size
        begin, view = span.offset + (part.first_row or 0) * size, _bytes_of(data)
        for number in range(span.width):
            put(self._file, view[number * run : (number + 1) * run], begin + number * stride)
        self._progress(len(data))

    def _buffer(self, name: str, size: int) -> Tensor:
        """A buffer of ``size`` bytes, the same memory for each piece."""
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8)
        return self._buffers[name][:size]


def _bytes_of(values: Tensor) -> memoryview:
    return memoryview(values.numpy())  # type: ignore[arg-type]
