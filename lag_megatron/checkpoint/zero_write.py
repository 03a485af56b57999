"""Writing one rank's files of a ZeRO checkpoint that DeepSpeed's own loader takes unchanged.

Counters, hyper-parameters and DeepSpeed's bookkeeping come from a template checkpoint of the same
ZeRO stage; buffers get the lengths of the new layout.  Files are mapped, so memory stays flat.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint import pickles
from lag_megatron.checkpoint.boxes import numel
from lag_megatron.checkpoint.commit import seal
from lag_megatron.checkpoint.layout import Container, Layout, State, Topology
from lag_megatron.checkpoint.zero import ZeroCheckpoint
from lag_megatron.checkpoint.zero_files import (
    model_file,
    optimizer_file,
    state_buffer,
    torch_optimizer_state,
)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BYTES_OF_STATE = 12


class _Room:
    """Makes tensors that a plan will fill, and knows them from those to be taken over."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}

    def __call__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for ``shape``; it is never touched, so it costs address space and no memory."""
        tensor = torch.empty(tuple(shape), dtype=dtype)
        self._tensors[id(tensor)] = tensor
        return tensor

    def take_over(self, tree: Any, mapped: Any) -> None:
        """Write the tensors of ``tree`` that no plan will fill, such as step counters."""
        if isinstance(tree, Tensor):
            if id(tree) not in self._tensors:
                mapped.copy_(tree)
        elif isinstance(tree, Mapping):
            for key, value in tree.items():
                self.take_over(value, mapped[key])
        elif isinstance(tree, (list, tuple)):
            for value, other in zip(tree, mapped, strict=True):
                self.take_over(value, other)


class RankWriter:
    """The files of one (tensor rank, data rank), laid out and waiting for their values.

    Args:
        folder: where to write; it exists.
        topology: of the new checkpoint.
        layout: of the new checkpoint.
        template: a checkpoint of the same stage to take everything else from.
        origins: for each new parameter, the template's name in whose place it stands.
        client_state: what the trainer keeps in the model file.
    """

    def __init__(
        self,
        folder: Path,
        topology: Topology,
        layout: Layout,
        *,
        tensor_rank: int,
        data_rank: int,
        template: ZeroCheckpoint,
        origins: Mapping[str, str],
        client_state: Mapping[str, Any],
    ) -> None:
        self.topology, self.layout = topology, layout
        self.tensor_rank, self.data_rank = tensor_rank, data_rank
        self.writes_model = topology.zero_stage == 3 or data_rank == 0
        self._paths: list[Path] = []
        self._model: Any = None
        self._states: Any = None
        room = _Room()
        # ZeRO shards differ in nothing but their buffers, so rank 0's file serves all as template.
        template_data = data_rank if data_rank < template.topology.data_size else 0
        template_tensor = tensor_rank if tensor_rank < template.topology.tensor_size else 0
        if self.writes_model:
            old = template.model_states(template_tensor, template_data)
            name = model_file(topology, tensor_rank=tensor_rank, data_rank=data_rank)
            model = _model_tree(old, topology, layout, origins, client_state, room)
            self._model = self._create(folder / name, model, room)
        optimizer_name = optimizer_file(topology, tensor_rank=tensor_rank, data_rank=data_rank)
        if optimizer_name is not None:
            old = template.optimizer_states(template_tensor, template_data)
            states = _optimizer_tree(old, topology, layout, data_rank, room)
            self._states = self._create(folder / optimizer_name, states, room)

    def containers(self) -> list[Container]:
        """The buffers of this rank's files."""
        if self.topology.zero_stage == 0 and not self.writes_model:
            return []
        return sorted(c for c in self.layout.lengths if c.data_rank == self.data_rank)

    def buffer(self, container: Container, state: State) -> Tensor:
        """A flat buffer of optimizer state to be written."""
        names = list(self.layout.shapes)
        return state_buffer(self.topology, self._model, self._states, container.key, state, names)

    def weight(self, name: str) -> Tensor | None:
        """The flattened forward weight to be written beside its fp32 master; None without one."""
        if not self.writes_model or self.topology.zero_stage == 3:
            return None
        if self.topology.zero_stage == 0 and self.topology.precision == "fp32":
            return None
        tensor = self._model["module"][name]
        return tensor.view(-1) if isinstance(tensor, Tensor) else None

    def finish(self) -> dict[str, Any]:
        """Flush the files and return their manifest entries by name."""
        self._model = self._states = None
        return {path.name: seal(path) for path in self._paths}

    def _create(self, path: Path, tree: Any, room: _Room) -> Any:
        mapped = pickles.create(path, tree)
        room.take_over(tree, mapped)
        self._paths.append(path)
        return mapped


def bytes_of(topology: Topology, layout: Layout) -> int:
    """Bytes of all tensors of a whole checkpoint of this layout, all ranks together."""
    buffers = sum(layout.lengths.values()) * _BYTES_OF_STATE
    weights = 0
    if topology.zero_stage in (1, 2) or (topology.zero_stage, topology.precision) == (0, "bf16"):
        weights = sum(map(numel, layout.shapes.values())) * _DTYPES[topology.precision].itemsize
    return (buffers + weights) * topology.tensor_size


def _model_tree(
    old: Mapping[str, Any],
    topology: Topology,
    layout: Layout,
    origins: Mapping[str, str],
    client_state: Mapping[str, Any],
    room: _Room,
) -> dict[str, Any]:
    shapes = [OrderedDict((n, torch.Size(s)) for n, s in g.items()) for g in layout.groups]
    if topology.zero_stage == 3:
        shapes = [
            OrderedDict((n, torch.Size(layout.groups[group][n])) for n in names)
            for group, names in layout.subgroups
        ]
    tree = dict(old)
    tree["module"] = _module_tree(old["module"], topology, layout, origins, room)
    tree["param_shapes"] = None if topology.zero_stage == 0 else shapes
    tree["dp_world_size"] = topology.data_size
    tree["mp_world_size"] = topology.tensor_size
    tree["lag"] = dict(client_state)
    if topology.zero_stage == 0:
        tree["optimizer"] = _unpartitioned_optimizer(old, topology, layout, room)
    return tree


def _module_tree(
    old: Mapping[str, Any],
    topology: Topology,
    layout: Layout,
    origins: Mapping[str, str],
    room: _Room,
) -> "OrderedDict[str, Any]":
    dtype, shapes = _DTYPES[topology.precision], layout.shapes
    module: OrderedDict[str, Any] = OrderedDict()
    for name, before in origins.items():
        value = old[before]
        if name not in shapes:
            module[name] = value
        elif topology.zero_stage == 3:
            module[name] = torch.empty(0, dtype=dtype)
        else:
            module[name] = room(shapes[name], dtype)
    return module


def _unpartitioned_optimizer(
    old: Mapping[str, Any], topology: Topology, layout: Layout, room: _Room
) -> dict[str, Any]:
    names = list(layout.shapes)
    inner = torch_optimizer_state(topology, old, None)
    state = {
        key: _moments(inner["state"][0], layout.shapes[name], room)
        for key, name in enumerate(names)
    }
    numbers = iter(range(len(names)))
    groups = [
        {**settings, "params": [next(numbers) for _ in group]}
        for settings, group in zip(inner["param_groups"], layout.groups, strict=True)
    ]
    grown = {**inner, "state": state, "param_groups": groups}
    if topology.precision == "fp32":
        return grown
    masters = [[room(shape) for shape in group.values()] for group in layout.groups]
    return {**old["optimizer"], "optimizer_state_dict": grown, "fp32_groups": masters}


def _moments(old: Mapping[str, Any], shape: Sequence[int], room: _Room) -> dict[str, Any]:
    large = {"exp_avg": room(shape), "exp_avg_sq": room(shape)}
    # Cloned: entries that shared one step counter would each advance it for all.
    kept = {k: v.clone() if isinstance(v, Tensor) else v for k, v in old.items() if k not in large}
    return kept | large


def _optimizer_tree(
    old: Mapping[str, Any], topology: Topology, layout: Layout, data_rank: int, room: _Room
) -> dict[str, Any]:
    optimizer = dict(old["optimizer_state_dict"])
    if topology.zero_stage == 3:
        optimizer |= _stage3_optimizer(optimizer, layout, data_rank, room)
    else:
        optimizer |= _flat_optimizer(optimizer, topology, layout, data_rank, room)
    return {**old, "optimizer_state_dict": optimizer}


def _flat_optimizer(
    old: Mapping[str, Any], topology: Topology, layout: Layout, data_rank: int, room: _Room
) -> dict[str, Any]:
    keys = layout.keys(data_rank)
    lengths = [layout.lengths[Container(data_rank, key)] for key in keys]
    filled = [layout.filled[Container(data_rank, key)] for key in keys]
    inner = old["base_optimizer_state"]
    state = {key: _moments(inner["state"][key], (lengths[key],), room) for key in keys}
    slices: list[OrderedDict[str, Any]] = [OrderedDict() for _ in keys]
    for name, segment in layout.of_rank(data_rank):
        address = pickles.FragmentAddress(numel=segment.length, start=segment.offset)
        slices[segment.container.key][name] = address
    return {
        "base_optimizer_state": {**inner, "state": state},
        "single_partition_of_fp32_groups": [room((count,)) for count in filled],
        "group_paddings": [n - f for n, f in zip(lengths, filled, strict=True)],
        "param_alignment_paddings": [[0] * len(group) for group in layout.groups],
        "partition_count": [topology.data_size] * len(keys),
        "param_slice_mappings": slices,
    }


def _stage3_optimizer(
    old: Mapping[str, Any], layout: Layout, data_rank: int, room: _Room
) -> dict[str, Any]:
    inner = old["optimizer_state_dict"]
    lengths = [layout.lengths[Container(data_rank, key)] for key in layout.keys(data_rank)]
    numbered = [group for group, _ in layout.subgroups]
    groups = [
        {**settings, "params": [key for key, group in enumerate(numbered) if group == number]}
        for number, settings in enumerate(inner["param_groups"])
    ]
    first = inner["state"][0]
    state = {key: _moments(first, (length,), room) for key, length in enumerate(lengths)}
    return {
        "optimizer_state_dict": {**inner, "state": state, "param_groups": groups},
        "fp32_flat_groups": [room((length,)) for length in lengths],
        "partition_count": max(container.data_rank for container in layout.lengths) + 1,
    }
