"""Safetensors files written one tensor at a time; the library's own writer wants all at once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from lag_megatron.checkpoint.boxes import Shape, numel

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_INDEX = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes will lie."""

    file: Path
    offset: int
    shape: Shape


class SafetensorsWriter:
    """A folder of safetensors files whose headers are written at once, and tensors in any order.

    Args:
        folder: where the files are made.
        shapes: of every tensor, in the order in which they are to lie.
        dtype: of all of them.
        max_shard_size: bytes, or a text like ``5GB``; a larger model is split into several files
            with an index beside them.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Shape],
        *,
        dtype: torch.dtype,
        max_shard_size: int | str,
    ) -> None:
        self._dtype = dtype
        self._places: dict[str, Place] = {}
        split = split_state_dict_into_shards_factory(
            dict(shapes),
            get_storage_size=lambda shape: numel(shape) * dtype.itemsize,
            filename_pattern=_PATTERN,
            max_shard_size=max_shard_size,
        )
        for file, names in split.filename_to_tensors.items():
            self._begin(folder / file, {name: shapes[name] for name in names})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor in its place; it is converted to the files' precision."""
        place = self._places[name]
        if tuple(tensor.shape) != place.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {place.shape}")
        values = tensor.to(self._dtype).contiguous().view(-1).view(torch.uint8)
        with place.file.open("r+b", buffering=0) as file:
            file.seek(place.offset)
            data = memoryview(values.numpy())  # type: ignore[arg-type]
            while data:
                data = data[file.write(data) :]

    def _begin(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        """Make a file of its final size with its header."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + numel(shape) * self._dtype.itemsize
            ends[name] = begin
            header[name] = {
                "dtype": _NAMES[self._dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for name, begin in ends.items():
            self._places[name] = Place(path, 8 + len(text) + begin, shapes[name])
