"""Templates of ``torch.save`` files: files of one kind are the same bytes but for their values.

A universal checkpoint is hundreds of small files, and ``torch.save`` takes milliseconds for each,
longer than writing its values.  So torch writes the first file of a kind, and its zip records and
pickle are copied to the others.
"""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.state.region import RegionFiller
from lag_megatron.checkpoint.state.spec import PlaceholderTensors
from lag_megatron.checkpoint.writer.context import WriteContext
from lag_megatron.checkpoint.writer.file_writer import (
    fill_file,
    opened,
    put,
    write_image,
    write_spans,
)
from lag_megatron.checkpoint.writer.pieces import Span

_IMAGE_BYTES = 1 << 16  # smaller files are put together in memory

# Creates a file with all but its values, and returns the spans of those.
LayOutFn = Callable[[Path, Any, PlaceholderTensors], list[Span]]


@dataclass(frozen=True, slots=True)
class _FileTemplate:
    """A file without its values.

    Attributes:
        size: bytes of the file.
        rest: offsets and bytes of everything else.
        begins: offsets at which the values of each tensor begin.
    """

    size: int
    rest: Sequence[tuple[int, bytes]]
    begins: Sequence[int]

    @staticmethod
    def of(path: Path, spans: Sequence[Span]) -> "_FileTemplate":
        """The template of a file that is laid out; its values need not be written yet."""
        rest, at, size = [], 0, path.stat().st_size
        with path.open("rb") as file:
            for low, high in [*sorted((s.offset, s.end) for s in spans), (size, size)]:
                file.seek(at)
                rest.append((at, file.read(low - at)))
                at = high
        return _FileTemplate(size, rest, [span.offset for span in spans])

    def image(self) -> bytearray:
        """The bytes of a whole file, with zeros for its values."""
        image = bytearray(self.size)
        for offset, data in self.rest:
            image[offset : offset + len(data)] = data
        return image

    def fill(self, file: int) -> None:
        """Write everything but the values into an empty file, and leave holes for those.

        Nothing is reserved, which would cost a transaction of the file system for each file: values
        are written by system calls, which report a full disk.
        """
        os.ftruncate(file, self.size)
        for offset, data in self.rest:
            put(file, memoryview(data), offset)


class FileTemplateCache:
    """The templates of a checkpoint's files, made when first needed; threads may share a cache.

    For files that hold one tensor, or a flat dictionary of tensors and plain values.
    """

    def __init__(self) -> None:
        self._templates: dict[Hashable, _FileTemplate] = {}

    def write(
        self,
        path: Path,
        objects: Any,
        placeholders: PlaceholderTensors,
        fill: RegionFiller,
        context: WriteContext,
        *,
        lay_out: LayOutFn,
    ) -> dict[str, Any]:
        """Lay out a file and write its values.

        Args:
            path: of the file; files of one kind have one name.
            objects: what the file holds.
            placeholders: tells which of the tensors are values to be made.
            fill: makes them.
            context: callbacks and buffers.
            lay_out: lays out the first file of a kind.

        Returns:
            the file's manifest entry.
        """
        entries = objects if isinstance(objects, Mapping) else {"": objects}
        key = (path.name, *((name, _described(v, placeholders)) for name, v in entries.items()))
        template = self._templates.get(key)
        if template is None:
            spans = lay_out(path, objects, placeholders)
            self._templates[key] = _FileTemplate.of(path, spans)
            return write_spans(path, spans, fill, context)
        values = [v for v in entries.values() if id(v) in placeholders.regions and v.numel()]
        spans = [
            Span(begin, value.dtype, placeholders.regions[id(value)])
            for begin, value in zip(template.begins, values, strict=True)
        ]
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
            if template.size <= _IMAGE_BYTES:
                return write_image(file, template.image(), spans, fill, context)
            template.fill(file)
            return fill_file(file, spans, fill, context)


def _described(value: Any, placeholders: PlaceholderTensors) -> Hashable:
    """Everything of an entry that the file holds beside the values."""
    if not isinstance(value, Tensor):
        return type(value), value
    if id(value) in placeholders.regions:
        return tuple(value.shape), value.dtype
    return tuple(value.shape), value.dtype, tuple(value.flatten().tolist())
