"""Writing one rank's files of a ZeRO checkpoint that DeepSpeed's own loader takes unchanged."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.layout import Layout, Topology
from lag_megatron.checkpoint.state.region import Fill
from lag_megatron.checkpoint.state.spec import DTYPES, CheckpointSpec, PlaceholderTensors
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.checkpoint.writer.file_template import FileTemplateCache
from lag_megatron.checkpoint.writer.file_writer import (
    DEFAULT_CONTEXT,
    Span,
    WriteContext,
    write_spans,
)
from lag_megatron.checkpoint.zero.file_names import model_file, optimizer_file
from lag_megatron.checkpoint.zero.model_states import model_objects
from lag_megatron.checkpoint.zero.optim_states import optimizer_objects
from lag_megatron.errors import CheckpointError

_BYTES = 4


def write_rank(
    folder: Path,
    draft: CheckpointSpec,
    fill: Fill,
    *,
    tensor_rank: int,
    data_rank: int,
    crew: WriteContext = DEFAULT_CONTEXT,
) -> dict[str, Any]:
    """Write one rank's files and return their manifest entries by name.

    Args:
        folder: where to; it exists.
        draft: what is to be written.
        fill: makes the values of each region.
        crew: told of each piece, and of each finished file.

    Raises:
        CheckpointError: when a file cannot be written; nothing of it stays then.
    """
    ranks = {"tensor_rank": tensor_rank, "data_rank": data_rank}
    topology = draft.topology
    entries: dict[str, Any] = {}
    if topology.zero_stage == 3 or data_rank == 0:
        room = PlaceholderTensors()
        objects = model_objects(draft, **ranks, room=room)
        name = model_file(topology, **ranks)
        entries[name] = write_objects(folder / name, objects, room, fill, crew)
    optimizer = optimizer_file(topology, **ranks)
    if optimizer is not None:
        room = PlaceholderTensors()
        objects = optimizer_objects(draft, data_rank=data_rank, room=room)
        entries[optimizer] = write_objects(folder / optimizer, objects, room, fill, crew)
    return entries


def bytes_of(topology: Topology, layout: Layout, frozen: Layout | None = None) -> int:
    """Bytes of all tensors of a whole checkpoint of this layout, all ranks together."""
    size = sum(sum(there.lengths.values()) for there in layout.states.values()) * _BYTES
    width = DTYPES[topology.precision].itemsize
    if topology.zero_stage in (1, 2) or (topology.zero_stage == 0 and topology.precision != "fp32"):
        size += sum(map(numel, layout.shapes.values())) * width
    if frozen is not None:
        size += sum(frozen.lengths.values()) * width
    return size * topology.tensor_size


def write_objects(
    path: Path,
    objects: Any,
    room: PlaceholderTensors,
    fill: Fill,
    crew: WriteContext,
    moulds: FileTemplateCache | None = None,
) -> dict[str, Any]:
    """Write a file of ``torch.save`` whose large tensors are filled in, and return its entry.

    Args:
        path: the file.
        objects: what it holds; tensors that ``room`` made are filled, others taken over.
        room: knows which those are.
        fill: makes the values.
        crew: told of each piece, and of the finished file.
        moulds: of files of its kind, where there are many of them.

    Raises:
        CheckpointError: when it cannot be written; nothing of it stays then.
    """
    try:
        if moulds is None:
            entry = write_spans(path, _laid_out(path, objects, room), fill, crew)
        else:
            entry = moulds.write(path, objects, room, fill, crew, by=_laid_out)
        crew.flush(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: cannot write: {error.strerror or error}. What was there before is untouched. "
            "Free some space, or use another disk, and run the same command again."
        ) from None
    return entry


def _laid_out(path: Path, objects: Any, room: PlaceholderTensors) -> list[Span]:
    """Create the file with all but its large values, which are still to be written."""
    mapped = torch_pickle.create(path, objects)
    pairs = list(_tensors(objects, mapped))
    offsets = torch_pickle.byte_offsets(path, [there for _, there in pairs])
    spans: dict[int, Span] = {}
    for (here, there), offset in zip(pairs, offsets, strict=True):
        region = room.regions.get(id(here))
        if region is None:
            there.copy_(here)
        elif region.length:
            spans[offset] = Span(offset, here.dtype, region)  # once, where two names share it
    return list(spans.values())


def _tensors(tree: Any, mapped: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Every tensor of a tree of objects beside its twin in the file."""
    if isinstance(tree, Tensor):
        yield tree, mapped
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, mapped[key])
    elif isinstance(tree, (list, tuple)):
        for value, other in zip(tree, mapped, strict=True):
            yield from _tensors(value, other)
