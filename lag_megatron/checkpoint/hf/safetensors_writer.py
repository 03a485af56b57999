"""Safetensors files that are created before their values; the library needs all values at once."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from lag_megatron.checkpoint.state.box import Shape, numel

INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?(?:[KMGT]B)?", re.ASCII | re.IGNORECASE)
_PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A safetensors file to write.

    Attributes:
        name: of the file.
        shapes: of its tensors, in their order in the file.
        dtype: of all tensors.
    """

    name: str
    shapes: Mapping[str, Shape]
    dtype: torch.dtype

    def create(self, folder: Path) -> dict[str, int]:
        """Create the file with its header in its final size, which is reserved on the disk.

        Returns:
            the byte offset of each tensor's values.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begins, end = {}, 0
        for name, shape in self.shapes.items():
            begin, end = end, end + numel(shape) * self.dtype.itemsize
            begins[name] = begin
            header[name] = {
                "dtype": _NAMES[self.dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
        with (folder / self.name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        return {name: 8 + len(text) + begin for name, begin in begins.items()}


def lay_out(
    shapes: Mapping[str, Shape], *, dtype: torch.dtype, max_shard_size: int | str
) -> tuple[list[SafetensorsFile], str | None]:
    """Distribute a model's tensors over files, with the text of the index if there are several.

    Args:
        shapes: of every tensor, in the order in which they are written.
        dtype: of all tensors.
        max_shard_size: bytes of a file, or a text like ``5GB``.

    Raises:
        ValueError: if ``max_shard_size`` is no such size above 0.
    """
    match = _SIZE.fullmatch(str(max_shard_size))
    if match is None or not float(match[1]):
        raise ValueError("expected a size above 0 like 5GB or 500MB, or a number of bytes")
    split = split_state_dict_into_shards_factory(
        dict(shapes),
        get_storage_size=lambda shape: numel(shape) * dtype.itemsize,
        filename_pattern=_PATTERN,
        max_shard_size=max_shard_size,
    )
    files = [
        SafetensorsFile(file, {name: shapes[name] for name in names}, dtype)
        for file, names in split.filename_to_tensors.items()
    ]
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return files, json.dumps(index, indent=2) + "\n" if split.is_sharded else None
