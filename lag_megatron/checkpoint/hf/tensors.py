"""The tensors of a transformers directory, a few rows at a time."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from lag_megatron.checkpoint.hf import format as hf_format
from lag_megatron.checkpoint.hf.weight_files import PICKLED_INDEX, pickled_files
from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.errors import CheckpointError

T = TypeVar("T")
FLOAT_DTYPES = ("F32", "BF16", "F16", "torch.float32", "torch.bfloat16", "torch.float16")


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor on disk, read a few rows at a time.

    Attributes:
        file: that holds it.
        shape: of the whole tensor.
        dtype: its name in the file.
        values: supports slicing.
    """

    file: Path
    shape: Shape
    dtype: str
    values: Any

    def rows(self, first: int, last: int, *, transposed: bool = False) -> Tensor:
        """Rows ``first .. last``, or columns of a ``transposed`` matrix as rows."""
        if transposed and len(self.shape) == 2:
            columns: Tensor = self.values[:, first:last]
            return columns.t()
        found: Tensor = self.values[first:last]
        return found

    def equals(self, other: "LazyTensor") -> bool:
        """Whether another tensor has the same shape and values; 1 MiB or so is read at a time."""
        step = max(1, (1 << 20) // max(1, numel(other.shape[1:])))
        return self.shape == other.shape and all(
            torch.equal(self.rows(at, at + step), other.rows(at, at + step))
            for at in range(0, self.shape[0], step)
        )


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of a directory by its name; headers are read, values are not.

    Raises:
        CheckpointError: if files are missing or damaged, or hold something else than weights.
    """
    entries, problems = hf_format.tensors_of(path)
    if problems:
        raise CheckpointError(f"{path}: {problems[0]}")
    if not entries:
        return _pickled(path)
    files = {entry.file for entry in entries.values()}
    opened: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in files}
    found: dict[str, LazyTensor] = {}
    for name, entry in entries.items():
        values = opened[entry.file].get_slice(name)
        found[name] = LazyTensor(entry.file, entry.shape, entry.dtype, values)
    return found


def with_whole_names(path: Path, tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Tensors by their names in the whole model, from older names or those of a bare model.

    Args:
        path: of the directory, for messages.
        tensors: by their names in its files.
        prefix: of the names in the whole model, which files of a bare one leave out.

    Raises:
        CheckpointError: if two of them have one name in the whole model.
    """
    bare = not any(name.startswith(prefix) for name in tensors)
    found: dict[str, T] = {}
    for name, stored in tensors.items():
        whole = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        whole = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", whole)
        if bare and not whole.startswith(("lm_head.", "cls.")):
            whole = prefix + whole
        if whole in found:
            raise CheckpointError(
                f"{path}: {whole} is there twice, also as {name}: either could be meant. Remove "
                "the one that is not."
            )
        found[whole] = stored
    return found


def _pickled(path: Path) -> dict[str, LazyTensor]:
    """Tensors of ``pytorch_model.bin``, read ``weights_only``, and mapped if it is an archive."""
    files = pickled_files(path)
    if not files.names:
        raise CheckpointError(f"{path}: no weights: neither safetensors nor pytorch_model.bin.")
    found: dict[str, LazyTensor] = {}
    for name in files.names:
        file = path / name
        values = torch_pickle.load(file)
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: holds no tensors by name.")
        found |= {
            key: LazyTensor(file, tuple(value.shape), str(value.dtype), value)
            for key, value in values.items()
            if isinstance(value, Tensor) and files.holds(name, key)
        }
    if gone := [tensor for tensor in files.placed or () if tensor not in found]:
        raise CheckpointError(
            f"{path}: {gone[0]} is not in the file in which {PICKLED_INDEX} places it."
        )
    return found
