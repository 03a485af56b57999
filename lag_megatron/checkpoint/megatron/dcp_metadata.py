"""The ``.metadata`` of a torch Distributed Checkpoint (DCP), and checks of its data files.

``.metadata`` is a bare pickle of torch's own classes, which ``torch.load(weights_only=True)`` does
not read.  The unpickler here allows an explicit list of names and replaces each class by a stand-in
without behaviour; any other name is refused before it is imported.  Objects inside the data files
were written by ``torch.save`` and are read ``weights_only``.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint.state.box import Box, Shape, numel
from lag_megatron.checkpoint.storage.file_names import leads_out
from lag_megatron.checkpoint.storage.integrity import EVERYTHING, VerifyScope
from lag_megatron.checkpoint.storage.torch_zip import damaged_records
from lag_megatron.errors import CheckpointError

METADATA = ".metadata"
_SMALL = 1 << 20  # bytes; larger objects are not settings


class _MetadataStandIn:
    """Keeps an object's arguments and state, without behaviour."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Metadata(_MetadataStandIn): ...


class _Tensor(_MetadataStandIn): ...


class _Object(_MetadataStandIn): ...


class _Index(_MetadataStandIn): ...


class _StorageInfo(_MetadataStandIn): ...


_DCP = "torch.distributed.checkpoint"
# All names that torch and Megatron-Core write; the planner's are in Megatron's `all_local_plans`.
_ALLOWED: dict[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", "Metadata"): _Metadata,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _Object,
    (f"{_DCP}.metadata", "MetadataIndex"): _Index,
    (f"{_DCP}.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): tuple,
    **dict.fromkeys(
        [
            (f"{_DCP}.metadata", "ChunkStorageMetadata"),
            (f"{_DCP}.metadata", "TensorProperties"),
            (f"{_DCP}.metadata", "StorageMeta"),
            (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
            (f"{_DCP}.filesystem", "_StoragePrefix"),
            (f"{_DCP}.planner", "SavePlan"),
            (f"{_DCP}.planner", "WriteItem"),
            (f"{_DCP}.planner", "WriteItemType"),
            (f"{_DCP}.planner", "TensorWriteData"),
            (f"{_DCP}.planner", "BytesIOWriteData"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # Python 3.13
        ],
        _MetadataStandIn,
    ),
    **{("torch", name): value for name, value in vars(torch).items() if type(value) is torch.dtype},
}


class _Refused(Exception):
    """A pickle names a class that is not on the list."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


@dataclass(frozen=True, slots=True)
class StorageLocation:
    """Bytes of a data file; ``transformed`` if they are compressed or otherwise encoded."""

    file: str
    offset: int
    length: int
    transformed: bool


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the boxes it is stored in, each with its location if it has one."""

    dtype: torch.dtype
    shape: Shape
    chunks: tuple[tuple[Box, StorageLocation | None], ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """The tensors and other values of a checkpoint, by name.

    Attributes:
        path: its directory.
        version: of the format, where it is recorded.
        tensors: tensors with the locations of their boxes.
        objects: locations of other values, each a ``torch.save`` file inside a data file.
    """

    path: Path
    version: str | None
    tensors: dict[str, StoredTensor] = field(repr=False)
    objects: dict[str, StorageLocation | None] = field(repr=False)

    def places(self) -> Iterator[tuple[str, StorageLocation | None, int]]:
        """Name, location and least number of bytes of everything that is stored."""
        for name, tensor in self.tensors.items():
            for box, place in tensor.chunks:
                yield name, place, numel(box.shape) * tensor.dtype.itemsize
        for name, place in self.objects.items():
            yield name, place, 0

    def read_object(self, name: str) -> Any:
        """A small stored value; None if it is absent, large, damaged or not a plain value."""
        place = self.objects.get(name)
        if place is None or place.transformed or place.length > _SMALL:
            return None
        try:
            with (self.path / place.file).open("rb") as file:
                file.seek(place.offset)
                data = io.BytesIO(file.read(place.length))
            return torch.load(data, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, LookupError):
            return None  # `problems` and `find_dcp_corruption` report damaged files


def read_metadata(path: Path) -> Contents:
    """Read a directory's ``.metadata``.

    Raises:
        CheckpointError: if it is missing, damaged, or names a class that is not on the list.
    """
    file = path / METADATA
    if not file.is_file():
        raise CheckpointError(
            f"{file}: missing. It is written last, so the checkpoint was not finished; use another."
        )
    try:
        with file.open("rb") as stream:
            found = _Unpickler(stream).load()
    except _Refused as error:
        raise CheckpointError(
            f"{file}: holds {error}, which no checkpoint's metadata has. "
            "Reading it could run code, so it was left alone. Use another checkpoint."
        ) from None
    except Exception as error:  # anything at all may come out of damaged bytes
        raise CheckpointError(_damaged(file, error)) from None
    if not isinstance(found, _Metadata):
        raise CheckpointError(f"{file}: holds no torch.distributed.checkpoint metadata.")
    try:
        return _contents(path, vars(found))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(_damaged(file, error)) from None


def problems(contents: Contents) -> Iterator[str]:
    """Yield what is missing: parts of tensors, data files, or the ends of data files."""
    for name, tensor in contents.tensors.items():
        if fault := _cover_fault([box for box, _ in tensor.chunks], tensor.shape):
            yield f"{METADATA}: {name}: {fault}"
    sizes: dict[str, int | None] = {}
    ends: dict[str, int] = {}
    for name, place, least in contents.places():
        if place is None:
            yield f"{METADATA}: {name}: does not say where its data lies"
            continue
        if place.file not in sizes:
            file = contents.path / place.file
            sizes[place.file] = file.stat().st_size if file.is_file() else None
        if place.length < least and not place.transformed:
            yield f"{METADATA}: {name}: {place.length} bytes stored, but its values take {least}"
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
    for file_name, size in sizes.items():
        if size is None:
            yield f"{file_name}: missing"
        elif size < ends[file_name]:
            yield f"{file_name}: cut short: {size} bytes, expected {ends[file_name]}"


def find_dcp_corruption(contents: Contents, scope: VerifyScope = EVERYTHING) -> Iterator[str]:
    """Yield all stored values that differ from the CRC32 that ``torch.save`` wrote."""
    for name, place, _ in scope.share(contents.places()):
        if place is None or place.transformed or not (contents.path / place.file).is_file():
            continue
        try:
            file = contents.path / place.file
            if any(damaged_records(file, offset=place.offset, length=place.length)):
                yield f"{place.file}: the content of {name} differs from its checksum"
        except CheckpointError:
            yield f"{place.file}: the data of {name} at byte {place.offset} is damaged or missing"


def _contents(path: Path, found: dict[str, Any]) -> Contents:
    places = _places(found["storage_data"])
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, StorageLocation | None] = {}
    for name, entry in found["state_dict_metadata"].items():
        if isinstance(entry, _Object):
            objects[name] = places.get((name, ()))
            continue
        boxes = [Box(_ints(c.offsets), _ints(c.sizes)) for c in entry.chunks]
        tensors[name] = StoredTensor(
            _dtype(entry.properties),
            _ints(entry.size),
            tuple((box, places.get((name, box.low))) for box in boxes if numel(box.shape)),
        )
    return Contents(path, found.get("version"), tensors, objects)


def _places(stored: dict[Any, Any]) -> dict[tuple[str, Shape], StorageLocation]:
    """Where each box lies, by its tensor's name and its corner.

    Raises:
        ValueError: if a box lies in two places, or outside of the directory.
    """
    places: dict[tuple[str, Shape], StorageLocation] = {}
    for index, info in stored.items():
        key = (index.fqn, _ints(getattr(index, "offset", None) or ()))
        encoded = bool(getattr(info, "transform_descriptors", None))
        file, begin, length = str(info.relative_path), int(info.offset), int(info.length)
        place = StorageLocation(file, begin, length, encoded)
        if leads_out(place.file):
            raise ValueError(f"{index.fqn} lies in {place.file!r}, not in this directory")
        if places.setdefault(key, place) != place:
            raise ValueError(f"{index.fqn} at {key[1]} lies in two places, of which one is stale")
    return places


def _ints(sizes: Any) -> Shape:
    return tuple(int(size) for size in sizes)


def _dtype(properties: Any) -> torch.dtype:
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r} is no dtype")
    return dtype


def _cover_fault(boxes: list[Box], shape: Shape) -> str:
    """Why boxes do not cover an array exactly once, or an empty text."""
    for box in boxes:
        if len(box.low) != len(shape) or any(
            a < 0 or n < 0 or a + n > size
            for a, n, size in zip(box.low, box.shape, shape, strict=True)
        ):
            return f"a piece of {box.shape} at {box.low} lies outside of its shape {shape}"
    ordered = sorted(boxes, key=lambda box: box.low)
    if any(a.low == b.low for a, b in pairwise(ordered)):
        return "a piece is listed twice"
    covered = sum(numel(box.shape) for box in boxes)
    if covered != numel(shape):
        return f"its pieces hold {covered} of {numel(shape)} elements"
    if any(a.intersect(b) for a, b in _near(ordered)):
        return "its pieces overlap, so others are missing"
    return ""


def _near(ordered: list[Box]) -> Iterator[tuple[Box, Box]]:
    """Pairs of boxes, sorted by corner, that meet along the first dimension."""
    for number, box in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if box.low and other.low[0] >= box.low[0] + box.shape[0]:
                break
            yield box, other


def _damaged(file: Path, error: Exception) -> str:
    return (
        f"{file}: damaged or cut short ({file.stat().st_size} bytes): "
        f"{type(error).__name__}: {error}. Restore it from a copy."
    )
