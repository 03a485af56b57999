"""Files of ``torch.save`` of one kind: what their values leave over is the same bytes in each.

A universal checkpoint is hundreds of small files.  torch takes milliseconds to lay one out, which
is longer than its values take; so it lays out the first of a kind, and that one shapes the others.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.draft import Room
from lag_megatron.checkpoint.stream import Span

LayOut = Callable[[Path, Any, Room], list[Span]]


@dataclass(frozen=True, slots=True)
class _Mould:
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
    def of(path: Path, spans: Sequence[Span]) -> "_Mould":
        """Of a file that was laid out; its values need not be there yet."""
        rest, at, size = [], 0, path.stat().st_size
        with path.open("rb") as file:
            for low, high in [*sorted((s.offset, s.end) for s in spans), (size, size)]:
                file.seek(at)
                rest.append((at, file.read(low - at)))
                at = high
        return _Mould(size, rest, [span.offset for span in spans])

    def fill(self, path: Path) -> None:
        """Make a file with holes for values: reserving each would be a transaction of the disk's.

        They are written by system calls, which say when the disk is full.
        """
        with path.open("wb") as file:  # buffered: one system call may write less than it is given
            file.truncate(self.size)
            for offset, data in self.rest:
                file.seek(offset)
                file.write(data)


class Moulds:
    """Those of a checkpoint's files, made as they are needed; threads may share them.

    They are for files that hold one tensor, or a flat dictionary of tensors and plain values.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Mould] = {}

    def lay_out(self, path: Path, objects: Any, room: Room, by: LayOut) -> list[Span]:
        """Make a file of its final size with all but the values that ``room`` knows.

        Args:
            path: of the file; files of one kind have one name.
            objects: what it holds.
            room: knows which tensors are values.
            by: lays out the first of a kind.

        Returns:
            where the values go.
        """
        entries = objects if isinstance(objects, Mapping) else {"": objects}
        key = (path.name, *((name, _described(v, room)) for name, v in entries.items()))
        mould = self._kept.get(key)
        if mould is None:
            spans = by(path, objects, room)
            self._kept[key] = _Mould.of(path, spans)
            return spans
        mould.fill(path)
        values = [v for v in entries.values() if id(v) in room.regions and v.numel()]
        return [
            Span(begin, value.dtype, room.regions[id(value)])
            for begin, value in zip(mould.begins, values, strict=True)
        ]


def _described(value: Any, room: Room) -> Hashable:
    """All of an entry that stands in the file beside its values."""
    if not isinstance(value, Tensor):
        return type(value), value
    if id(value) in room.regions:
        return tuple(value.shape), value.dtype
    return tuple(value.shape), value.dtype, tuple(value.flatten().tolist())
