"""Which files of a transformers directory hold its weights, and which file holds each tensor.

Several files have an index, which decides: what a file holds beside the tensors that the index
places there, such as an older copy, is not read.  Where nothing decides, two sources are refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lag_megatron.checkpoint.storage.file_names import leads_out
from lag_megatron.errors import CheckpointError
from lag_megatron.small_files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARDS, _PICKLED_SHARDS = "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files with a model's weights.

    Attributes:
        names: of the files, sorted.
        placed: the file of each tensor, where an index says it; None for one file without index.
    """

    names: list[str]
    placed: Mapping[str, str] | None = None

    def holds(self, file: str, tensor: str) -> bool:
        """Whether the model's tensor is the one in this file."""
        return self.placed is None or self.placed.get(tensor) == file


def safetensors_files(path: Path) -> WeightFiles:
    """The safetensors files of a directory; no names where there are none.

    Raises:
        CheckpointError: if the index is damaged or missing, or two sets of weights could be meant.
    """
    return _files(path, WEIGHTS, INDEX, _SHARDS)


def pickled_files(path: Path) -> WeightFiles:
    """The same for files of ``torch.save``."""
    return _files(path, PICKLED, PICKLED_INDEX, _PICKLED_SHARDS)


def weight_notes(path: Path) -> Iterator[str]:
    """A line on each file beside the weights that could be taken for them and is not read."""
    for name in _ADAPTERS:
        if (path / name).is_file():
            yield f"{name}: an adapter, left out: the weights are the model's without it"
    try:
        read, pickled = safetensors_files(path), pickled_files(path)
    except CheckpointError:
        return  # whoever reads the weights reports it
    if read.names:
        yield from (f"{n}: left out, {read.names[0]} is read" for n in pickled.names)
        for file in sorted(path.glob(_SHARDS)):
            if file.name not in read.names:
                yield f"{file.name}: left out, the model's files do not include it"


def _files(path: Path, single: str, index: str, pattern: str) -> WeightFiles:
    has_single = (path / single).is_file()
    if not (path / index).is_file():
        shards = sorted(p.name for p in path.glob(pattern))
        if shards and not has_single:
            raise CheckpointError(f"{index}: missing, but {shards[0]} is part of several")
        if shards:
            raise CheckpointError(
                f"{path}: holds {single} and also {shards[0]}, without an index that says which "
                "are the model's. Move the files that are not away."
            )
        return WeightFiles([single] if has_single else [])
    placed = _weight_map(path / index)
    names = sorted(set(placed.values()))
    if has_single and single not in names:
        raise CheckpointError(
            f"{path}: holds {single} and also {index}, which names other files: either could be "
            "the model. Move the one that is not away."
        )
    return WeightFiles(names, placed)


def _weight_map(index: Path) -> Mapping[str, str]:
    """The file of each tensor.

    Raises:
        CheckpointError: if the index is damaged, or names a file outside of its directory.
    """
    found = read_json(
        index,
        what="the index of a model's weights",
        error=CheckpointError,
        advice="Restore it from a copy.",
    )
    placed = found.get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(f, str) for f in placed.values()):
        raise CheckpointError(f"{index}: damaged: no weight_map. Restore it from a copy.")
    for tensor, file in placed.items():
        if leads_out(file):
            raise CheckpointError(
                f"{index}: places {tensor} in {file!r}, which is not in this directory. Expected "
                "the name of a file beside the index; restore it from a copy."
            )
    return placed
