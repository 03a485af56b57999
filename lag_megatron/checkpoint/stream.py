"""Filling a laid-out file front to back, hashed on the way, through one small buffer.

A mapped write costs a page fault for every page of the target, which is several times slower than
the copy itself; so values are made in a buffer that stays in the cache and written from there.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from lag_megatron.checkpoint.paging import write_behind
from lag_megatron.checkpoint.regions import Fill, Region

# Large enough that planning a piece costs little beside copying it, small enough for the cache.
PIECE_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 24
# One call of write with more gets the kernel to look for huge pages, which it may have to clear.
_WRITE_BYTES = 1 << 18
_GAP_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of a file, from ``offset``, that a region takes in ``dtype``."""

    offset: int
    dtype: torch.dtype
    region: Region

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.region.length * self.dtype.itemsize


def write_spans(
    path: Path, spans: Sequence[Span], fill: Fill, *, written: Callable[[int], object]
) -> dict[str, Any]:
    """Write every span and leave all other bytes as they are; flushing is the caller's.

    Args:
        path: a file that has its final size.
        spans: without overlap.
        fill: makes the values of a region.
        written: told the number of bytes after each piece.

    Returns:
        the file's manifest entry: size and xxh3-128 checksum.
    """
    digest = xxhash.xxh3_128()
    room = torch.empty(PIECE_BYTES, dtype=torch.uint8)
    with path.open("r+b", buffering=0) as file:
        at = begun = 0
        for span in sorted(spans, key=lambda s: s.offset):
            _hash_bytes(file.fileno(), digest, at, span.offset)
            at = span.offset
            for piece in _pieces(span, fill):
                buffer = room[: piece.length * span.dtype.itemsize]
                fill(piece, buffer.view(span.dtype))
                data = memoryview(buffer.numpy())  # type: ignore[arg-type]
                _write(file.fileno(), data, at)
                digest.update(data)
                at += len(data)
                written(len(data))
                if at - begun >= _WINDOW_BYTES:
                    write_behind(file.fileno(), begun, at - begun)
                    begun = at
        size = os.fstat(file.fileno()).st_size
        _hash_bytes(file.fileno(), digest, at, size)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def _pieces(span: Span, fill: Fill) -> Iterator[Region]:
    """The parts to be written at once; what they need is asked for some parts ahead."""
    width = span.dtype.itemsize
    for window in span.region.pieces(_WINDOW_BYTES // width):
        fill.expect(window)
        yield from window.pieces(PIECE_BYTES // width)


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data[:_WRITE_BYTES], offset)
        data, offset = data[count:], offset + count


def _hash_bytes(file: int, digest: Any, start: int, end: int) -> None:
    """Hash what stands between spans: the archive's own records, and small tensors."""
    while start < end:
        data = os.pread(file, min(_GAP_BYTES, end - start), start)
        if not data:
            raise OSError(f"the file ended at byte {start}, expected {end}")
        digest.update(data)
        start += len(data)
