"""Reading a distributed checkpoint of Megatron-Core or torch."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lag_megatron.checkpoint.families.layer_stack import count_layers
from lag_megatron.checkpoint.megatron import dcp_metadata, dist_checkpoint
from lag_megatron.checkpoint.megatron.arguments import model_of
from lag_megatron.checkpoint.megatron.dcp_metadata import Contents, StorageLocation, StoredTensor
from lag_megatron.checkpoint.megatron.param_names import Stacked, in_model_order, parameters_in
from lag_megatron.checkpoint.state.box import Box, Shape, interval_boxes, numel, strides_of
from lag_megatron.checkpoint.state.deepspeed_defaults import (
    decay_groups,
    default_group_states,
    default_header,
    module_keys,
)
from lag_megatron.checkpoint.state.layout import GroupState, ParamGroup, State
from lag_megatron.checkpoint.state.source import UnshardedCheckpoint
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import VerifyScope
from lag_megatron.checkpoint.storage.torch_zip import tensor_records
from lag_megatron.errors import CheckpointError

# Name prefixes of the states of Megatron's and of torch's optimizers.
_PREFIXES: Mapping[State, tuple[str, ...]] = {
    "fp32": ("optimizer.state.param.", "optimizer.state.fp32_param."),
    "exp_avg": ("optimizer.state.exp_avg.",),
    "exp_avg_sq": ("optimizer.state.exp_avg_sq.",),
}


def open_megatron(path: Path, *, weights_only: bool = False) -> UnshardedCheckpoint:
    """Open a directory by its metadata and settings; tensors stay on disk.

    Without an optimizer's states the weights become masters, and moments are 0.

    Args:
        path: the directory.
        weights_only: leave the optimizer's states out, even in an unknown form.

    Raises:
        CheckpointError: if it is incomplete, damaged, or holds unknown parameters or optimizer
            states in an unknown form.
    """
    if manifest.is_committed(path):
        manifest.check_sizes(path)
    if problems := dist_checkpoint.describe_dist_checkpoint(path)["problems"]:
        raise CheckpointError(f"{path}: {problems[0]}")
    contents = dcp_metadata.read_metadata(path)
    optimizer = {name for name in contents.tensors if dist_checkpoint.is_optimizer(name)}
    common: Mapping[str, Any] = {}
    note = ""
    if dist_checkpoint.is_megatron(path):
        common, note = dist_checkpoint.read_common(path)
    if weights_only:
        kept = {name: t for name, t in contents.tensors.items() if name not in optimizer}
        contents = replace(contents, tensors=kept)
    elif optimizer:
        _require_known_optimizer(path, contents, optimizer, note)
    return _DistReader(path, contents, common, note).source


def _require_known_optimizer(
    path: Path, contents: Contents, optimizer: set[str], note: str
) -> None:
    """Check that all optimizer states have known names and the shapes of their weights.

    Raises:
        CheckpointError: naming one that has not.
    """
    advice = "Convert with --weights-only, or save it as fully_reshardable."
    prefixes = [prefix for prefix, _ in prefixes_of(contents)]
    if len(prefixes) > len({state for _, state in prefixes_of(contents)}):
        raise CheckpointError(
            f"{path}: holds masters twice, as {' and as '.join(prefixes[:2])}: either could be "
            "meant. Convert with --weights-only, or save it again."
        )
    for name in sorted(optimizer):
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            raise CheckpointError(
                f"{path}: {name} is an optimizer's state in a form that is not known here. {advice}"
            )
        weights = contents.tensors.get(name.removeprefix(prefix))
        if weights is None or weights.shape != contents.tensors[name].shape:
            shape = contents.tensors[name].shape
            like = "are not there" if weights is None else f"have {weights.shape}"
            raise CheckpointError(
                f"{path}: {name} has the shape {shape}, and its weights {like}: flattened states "
                f"are not understood here. {advice}"
            )
    if note:
        raise CheckpointError(
            f"{path}: {note}, and without its step the optimizer cannot go on. {advice}"
        )


def prefixes_of(contents: Contents) -> list[tuple[str, State]]:
    """The name prefixes of the optimizer states in a checkpoint, each with its state."""
    return [
        (prefix, state)
        for state, prefixes in _PREFIXES.items()
        for prefix in prefixes
        if any(name.startswith(prefix) for name in contents.tensors)
    ]


@dataclass(frozen=True)
class _DistReader:
    path: Path
    contents: Contents
    common: Mapping[str, Any]
    note: str

    @property
    def source(self) -> UnshardedCheckpoint:
        names = [name for group in self.groups for name in group]
        kept = dist_checkpoint.client_state(self.common)
        known = self.common.get("iteration") or kept.get("step")
        step = int(known or dist_checkpoint.recorded_step(self.contents) or 0)
        state = {
            "step": step,
            "tokens": 0,
            "num_layers": count_layers({name: self._shape(name) for name in names}),
            "parameter_groups": [list(group) for group in self.groups],
            "growth_history": [],
            **kept,
        }
        arguments = self.common.get("args")
        if "model" not in state and isinstance(arguments, argparse.Namespace):
            state["model"] = model_of(arguments)
        return UnshardedCheckpoint(
            path=self.path,
            header=default_header(
                module_keys(in_model_order(names)), client_state=state, step=step
            ),
            groups=self.groups,
            group_states=self.group_states(step),
            read=self.read,
            check=self.check,
            notes=[self.note] if self.note else [],
        )

    @cached_property
    def parameters(self) -> dict[str, Stacked]:
        """Where each parameter's weights are stored."""
        tensors = dist_checkpoint.model_tensors(self.contents)
        if not tensors:
            raise CheckpointError(f"{self.path}: holds no weights.")
        return parameters_in({name: tensor.shape for name, tensor in tensors.items()})

    @cached_property
    def groups(self) -> list[ParamGroup]:
        """Shapes by parameter group: this program's groups, or else matrices and vectors."""
        known = dist_checkpoint.client_state(self.common).get("parameter_groups")
        if known is not None:
            return [{name: self._shape(name) for name in group} for group in known]
        return decay_groups({name: self._shape(name) for name in in_model_order(self.parameters)})

    def group_states(self, step: int) -> list[GroupState]:
        """The checkpoint's hyper-parameters if it has as many groups, or else torch's defaults."""
        defaults = default_group_states(self.groups, step=step if self._has("exp_avg") else 0)
        kept: Any = self.common.get("optimizer")
        while isinstance(kept, dict) and "param_groups" not in kept:
            kept = kept.get("optimizer")
        listed = kept["param_groups"] if isinstance(kept, dict) else []
        if len(listed) != len(defaults):
            return defaults
        found = []
        for group, other in zip(defaults, listed, strict=True):
            known = {key: other[key] for key in group.settings if key in other}
            steps = {"step": torch.tensor(float(other["step"]))} if "step" in other else {}
            found.append(GroupState({**group.settings, **known}, {**group.counters, **steps}))
        return found

    def read(self, name: str, state: State, start: int, length: int) -> Tensor:
        """Elements ``start .. start + length`` of a parameter's state."""
        where = self.parameters[name]
        prefix = self._has(state)
        if prefix is None and state != "fp32":
            return torch.zeros(length)
        tensor = self.contents.tensors[(prefix or "") + where.key]
        shape = self._shape(name)
        if where.layer is not None:
            start += where.layer * numel(shape)
        return self._elements(tensor, start, length)

    def check(self, scope: VerifyScope) -> None:
        """Verify the content against its checksums; raises ``CheckpointError``."""
        committed = manifest.is_committed(self.path)
        found = list(
            scope.find_corrupted_files(self.path)
            if committed
            else dcp_metadata.find_dcp_corruption(self.contents, scope)
        )
        if found:
            raise CheckpointError(f"{self.path}: damaged: {found[0]}. Restore it from a copy.")

    def _has(self, state: State) -> str | None:
        """The name prefix of a state; None if it is not stored."""
        return next((p for p, kept in prefixes_of(self.contents) if kept == state), None)

    def _shape(self, name: str) -> Shape:
        if name not in self.parameters:
            raise CheckpointError(f"{self.path}: {name} is missing. Restore it from a copy.")
        where = self.parameters[name]
        shape = self.contents.tensors[where.key].shape
        return shape if where.layer is None else shape[1:]

    def _elements(self, tensor: StoredTensor, start: int, length: int) -> Tensor:
        """A row-major run of a stored tensor, put together from its boxes."""
        found = torch.empty(length, dtype=tensor.dtype)
        for wanted in interval_boxes(tensor.shape, start, length):
            for box, place in tensor.chunks:
                both = wanted.intersect(box)
                if both is None or place is None:
                    continue
                values = self._stored(place, tensor.dtype, box.shape)
                to = both.offset_in(tensor.shape) - start
                here = found.as_strided(both.shape, strides_of(tensor.shape), to)
                here.copy_(values[_slices(both.move(box.low, (0,) * len(box.low)))])
        return found

    def _stored(self, place: StorageLocation, dtype: torch.dtype, shape: Shape) -> Tensor:
        """A stored box, mapped from disk."""
        key = (place.file, place.offset)
        if key not in self._mapped:
            self._mapped[key] = _map(self.path / place.file, place, dtype, shape)
        return self._mapped[key]

    @cached_property
    def _mapped(self) -> dict[tuple[str, int], Tensor]:
        return {}


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(box.low, box.shape, strict=True))


def _map(file: Path, place: StorageLocation, dtype: torch.dtype, shape: Shape) -> Tensor:
    """Map the tensor that ``torch.save`` wrote into a part of a file.

    Raises:
        CheckpointError: if the file holds something else there, or it is compressed.
    """
    try:
        (record,) = tensor_records(file, offset=place.offset, length=place.length)
    except ValueError:
        record = None
    size = numel(shape) * dtype.itemsize
    if record is None or record.length != size or record.packed or place.transformed:
        raise CheckpointError(
            f"{file}: the tensor at byte {place.offset} is stored in a way that is not understood "
            "here. Save it without compression."
        )
    data = np.memmap(file, dtype=np.uint8, mode="c", offset=record.begin, shape=(size,))
    return torch.from_numpy(data).view(dtype).view(shape)
