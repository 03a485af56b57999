"""Files of ``torch.save`` of one kind: what their values leave over is the same bytes in each.

A universal checkpoint is hundreds of small files.  torch takes milliseconds to lay one out, which
is longer than its values take; so it lays out the first of a kind, and that one shapes the others.
"""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.state.region import Fill
from lag_megatron.checkpoint.state.spec import PlaceholderTensors
from lag_megatron.checkpoint.writer.file_writer import (
    Span,
    WriteContext,
    fill_file,
    opened,
    put,
    write_image,
    write_spans,
)

_IMAGE_BYTES = 1 << 16  # of a file that is put together in memory

LayOut = Callable[[Path, Any, PlaceholderTensors], list[Span]]


@dataclass(frozen=True, slots=True)
class _FileTemplate:
    """A file without its values.

    Attributes:
        size: of the file.
        rest: offsets and bytes of what is no value.
        begins: where the values of each tensor begin.
    """

    size: int
    rest: Sequence[tuple[int, bytes]]
    begins: Sequence[int]

    @staticmethod
    def of(path: Path, spans: Sequence[Span]) -> "_FileTemplate":
        """Of a file that was laid out; its values need not be there yet."""
        rest, at, size = [], 0, path.stat().st_size
        with path.open("rb") as file:
            for low, high in [*sorted((s.offset, s.end) for s in spans), (size, size)]:
                file.seek(at)
                rest.append((at, file.read(low - at)))
                at = high
        return _FileTemplate(size, rest, [span.offset for span in spans])

    def image(self) -> bytearray:
        """All of a file, with zeros for its values."""
        image = bytearray(self.size)
        for offset, data in self.rest:
            image[offset : offset + len(data)] = data
        return image

    def fill(self, file: int) -> None:
        """Make an empty file one with holes for values: reserving each is a disk's transaction.

        They are written by system calls, which say when the disk is full.
        """
        os.ftruncate(file, self.size)
        for offset, data in self.rest:
            put(file, memoryview(data), offset)


class FileTemplateCache:
    """Those of a checkpoint's files, made as they are needed; threads may share them.

    They are for files that hold one tensor, or a flat dictionary of tensors and plain values.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, _FileTemplate] = {}

    def write(
        self,
        path: Path,
        objects: Any,
        room: PlaceholderTensors,
        fill: Fill,
        crew: WriteContext,
        *,
        by: LayOut,
    ) -> dict[str, Any]:
        """Write a file, as ``stream.write_spans`` does one that is laid out.

        Args:
            path: of the file; files of one kind have one name.
            objects: what it holds.
            room: knows which tensors are values.
            fill: makes them.
            crew: told of each piece.
            by: lays out the first of a kind.

        Returns:
            its manifest entry.
        """
        entries = objects if isinstance(objects, Mapping) else {"": objects}
        key = (path.name, *((name, _described(v, room)) for name, v in entries.items()))
        mould = self._kept.get(key)
        if mould is None:
            spans = by(path, objects, room)
            self._kept[key] = _FileTemplate.of(path, spans)
            return write_spans(path, spans, fill, crew)
        values = [v for v in entries.values() if id(v) in room.regions and v.numel()]
        spans = [
            Span(begin, value.dtype, room.regions[id(value)])
            for begin, value in zip(mould.begins, values, strict=True)
        ]
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
            if mould.size <= _IMAGE_BYTES:
                return write_image(file, mould.image(), spans, fill, crew)
            mould.fill(file)
            return fill_file(file, spans, fill, crew)


def _described(value: Any, room: PlaceholderTensors) -> Hashable:
    """All of an entry that stands in the file beside its values."""
    if not isinstance(value, Tensor):
        return type(value), value
    if id(value) in room.regions:
        return tuple(value.shape), value.dtype
    return tuple(value.shape), value.dtype, tuple(value.flatten().tolist())
