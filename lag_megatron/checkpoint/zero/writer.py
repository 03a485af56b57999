"""Writing one rank's files of a ZeRO checkpoint, as DeepSpeed's own loader reads them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.layout import Layout, Topology
from lag_megatron.checkpoint.state.region import RegionFiller
from lag_megatron.checkpoint.state.spec import DTYPES, CheckpointSpec, PlaceholderTensors
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.checkpoint.writer.context import DEFAULT_CONTEXT, WriteContext
from lag_megatron.checkpoint.writer.file_template import FileTemplateCache
from lag_megatron.checkpoint.writer.file_writer import write_spans
from lag_megatron.checkpoint.writer.pieces import Span
from lag_megatron.checkpoint.zero.file_names import model_file, optimizer_file
from lag_megatron.checkpoint.zero.model_states import model_objects
from lag_megatron.checkpoint.zero.optim_states import optimizer_objects
from lag_megatron.errors import CheckpointError, write_failure

_BYTES = 4


def write_rank(
    folder: Path,
    spec: CheckpointSpec,
    fill: RegionFiller,
    *,
    tensor_rank: int,
    data_rank: int,
    context: WriteContext = DEFAULT_CONTEXT,
) -> dict[str, Any]:
    """Write one rank's files and return their manifest entries by name.

    Args:
        folder: an existing directory.
        spec: the checkpoint to write.
        fill: makes the values of each region.
        tensor_rank: of the rank.
        data_rank: of the rank.
        context: callbacks and buffers.

    Raises:
        CheckpointError: when a file cannot be written; it is removed then.
    """
    ranks = {"tensor_rank": tensor_rank, "data_rank": data_rank}
    topology = spec.topology
    entries: dict[str, Any] = {}
    if topology.zero_stage == 3 or data_rank == 0:
        placeholders = PlaceholderTensors()
        objects = model_objects(spec, **ranks, placeholders=placeholders)
        name = model_file(topology, **ranks)
        entries[name] = write_objects(folder / name, objects, placeholders, fill, context)
    optimizer = optimizer_file(topology, **ranks)
    if optimizer is not None:
        placeholders = PlaceholderTensors()
        objects = optimizer_objects(spec, data_rank=data_rank, placeholders=placeholders)
        entries[optimizer] = write_objects(folder / optimizer, objects, placeholders, fill, context)
    return entries


def bytes_of(topology: Topology, layout: Layout, frozen: Layout | None = None) -> int:
    """Bytes of all tensors of a checkpoint of this layout, all ranks together."""
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
    placeholders: PlaceholderTensors,
    fill: RegionFiller,
    context: WriteContext,
    templates: FileTemplateCache | None = None,
) -> dict[str, Any]:
    """Write a ``torch.save`` file, fill in its placeholders, and return its manifest entry.

    Args:
        path: the file.
        objects: what the file holds.
        placeholders: tells which tensors of ``objects`` are filled; the others are copied.
        fill: makes the values.
        context: callbacks and buffers.
        templates: where there are many files of this kind.

    Raises:
        CheckpointError: when the file cannot be written; it is removed then.
    """
    try:
        if templates is None:
            entry = write_spans(path, _laid_out(path, objects, placeholders), fill, context)
        else:
            entry = templates.write(path, objects, placeholders, fill, context, lay_out=_laid_out)
        context.flush(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        reason, advice = write_failure(error)
        raise CheckpointError(
            f"{path}: cannot write: {reason} What was there before is untouched. {advice}"
        ) from None
    return entry


def _laid_out(path: Path, objects: Any, placeholders: PlaceholderTensors) -> list[Span]:
    """Create the file with everything but the placeholders' values, and return their spans."""
    mapped = torch_pickle.create(path, objects)
    pairs = list(_tensors(objects, mapped))
    offsets = torch_pickle.byte_offsets(path, [there for _, there in pairs])
    spans: dict[int, Span] = {}
    for (here, there), offset in zip(pairs, offsets, strict=True):
        region = placeholders.regions.get(id(here))
        if region is None:
            there.copy_(here)
        elif region.length:
            spans[offset] = Span(offset, here.dtype, region)  # two names may share one
    return list(spans.values())


def _tensors(tree: Any, mapped: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Every tensor of a tree of objects, with the mapped tensor in the file."""
    if isinstance(tree, Tensor):
        yield tree, mapped
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, mapped[key])
    elif isinstance(tree, (list, tuple)):
        for value, other in zip(tree, mapped, strict=True):
            yield from _tensors(value, other)
