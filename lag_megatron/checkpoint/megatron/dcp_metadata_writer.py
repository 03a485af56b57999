"""Writing the ``.metadata`` of a torch Distributed Checkpoint."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from lag_megatron.checkpoint.megatron.dcp_metadata import METADATA, StorageLocation, StoredTensor

_VERSION = "1.0.0"


def write_metadata(
    folder: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, StorageLocation]
) -> None:
    """Write a directory's ``.metadata``; several entries may have the same location.

    Args:
        folder: the directory.
        tensors: every stored tensor by its name, each box with a location.
        objects: locations of other values by name.
    """
    entries: dict[str, metadata.STORAGE_TYPES] = {}
    places: dict[metadata.MetadataIndex, Any] = {}
    for name, tensor in tensors.items():
        chunks: list[metadata.ChunkStorageMetadata] = []
        for box, place in tensor.chunks:
            low = torch.Size(box.low)
            if place is None:
                raise ValueError(f"{name}: the box at {box.low} has no place")
            places[metadata.MetadataIndex(name, low, len(chunks))] = _info(place)
            chunks.append(metadata.ChunkStorageMetadata(low, torch.Size(box.shape)))
        properties = metadata.TensorProperties(dtype=tensor.dtype)
        entries[name] = metadata.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    for name, place in objects.items():
        entries[name] = metadata.BytesStorageMetadata()
        places[metadata.MetadataIndex(name)] = _info(place)
    with (folder / METADATA).open("wb") as file:
        pickle.dump(metadata.Metadata(entries, None, places, version=_VERSION), file)


def _info(place: StorageLocation) -> Any:
    return filesystem._StorageInfo(place.file, place.offset, place.length)
