"""Reading a universal checkpoint."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.state.deepspeed_defaults import default_group_states
from lag_megatron.checkpoint.state.layout import GroupState, ParamGroup, State
from lag_megatron.checkpoint.state.source import UnshardedCheckpoint
from lag_megatron.checkpoint.state.tensor_parallel import is_gated, may_be_gated, unsharded_shape
from lag_megatron.checkpoint.storage import manifest, torch_pickle
from lag_megatron.checkpoint.storage.integrity import VerifyScope
from lag_megatron.checkpoint.universal import format as universal_format
from lag_megatron.checkpoint.universal.format import FOLDER, OPTIMIZER, Universal
from lag_megatron.errors import CheckpointError


def open_universal(path: Path) -> UnshardedCheckpoint:
    """Open a tag directory by its headers; tensors stay on disk.

    Raises:
        CheckpointError: naming the file that is missing, damaged or of another shape.
    """
    if manifest.is_committed(path):
        manifest.check_sizes(path)
    if problems := universal_format.describe_universal(path)["problems"]:
        raise CheckpointError(f"{path}: {problems[0]}")
    checkpoint = Universal.open(path)
    degrees = checkpoint.header.get("checkpoint_parallel_dimensions") or {}
    if degrees.get("pp_degree", 1) != 1:
        raise CheckpointError(f"{path}: pipeline-parallel checkpoints are not understood here.")
    return _UniversalReader(path, checkpoint).source


@dataclass(frozen=True)
class _UniversalReader:
    path: Path
    checkpoint: Universal

    @property
    def source(self) -> UnshardedCheckpoint:
        header = self.checkpoint.header
        return UnshardedCheckpoint(
            path=self.path,
            header=header,
            groups=self.groups,
            group_states=self.group_states,
            read=self.read,
            untrained={
                name: tuple(self._stored(name, "fp32").shape)
                for name in sorted(self.checkpoint.frozen)
            },
            check=self.check,
            aliases=dict(header.get("shared_params") or {}),
        )

    @cached_property
    def groups(self) -> list[ParamGroup]:
        """Unsharded shapes by parameter group; ZeRO-3 lists them by sub-group."""
        listed: list[ParamGroup] = [
            {name: self._unsharded_shape(name, tuple(shape)) for name, shape in group.items()}
            for group in self.checkpoint.header["param_shapes"]
        ]
        settings = self._optimizer["param_groups"]
        if len(listed) == len(settings):
            return listed
        joined: list[ParamGroup] = []
        for group in settings:
            joined.append({n: s for key in group["params"] for n, s in listed[key].items()})
        return joined

    @cached_property
    def group_states(self) -> list[GroupState]:
        """Hyper-parameters and the number of steps."""
        found = []
        for group, listed, default in zip(
            self._optimizer["param_groups"],
            self.groups,
            default_group_states(self.groups),
            strict=True,
        ):
            known = {key: value for key, value in group.items() if key != "params"}
            settings = {**default.settings, **known}
            found.append(GroupState(settings, {"step": self._step(next(iter(listed)))}))
        return found

    def read(self, name: str, state: State, start: int, length: int) -> Tensor:
        """Elements of a parameter's state; vocabulary padding that is not stored is 0."""
        stored = self._stored(name, state).reshape(-1)
        part = stored[start : start + length]
        if len(part) == length:
            return part
        return torch.cat([part, torch.zeros(length - len(part))])

    def check(self, scope: VerifyScope) -> None:
        """Verify the content against its checksums; raises ``CheckpointError``."""
        committed = manifest.is_committed(self.path)
        if found := list(
            scope.find_corrupted_files(self.path)
            if committed
            else universal_format.find_universal_corruption(self.path, scope)
        ):
            raise CheckpointError(f"{self.path}: damaged: {found[0]}. Convert again.")

    @cached_property
    def _optimizer(self) -> Any:
        return torch_pickle.load(self.path / FOLDER / OPTIMIZER)

    def _stored(self, name: str, state: str) -> Tensor:
        key = (name, state)
        if key not in self._opened:
            self._opened[key] = self.checkpoint.state(name, state)
        return self._opened[key]

    @cached_property
    def _opened(self) -> dict[tuple[str, str], Tensor]:
        return {}

    def _unsharded_shape(self, name: str, local: Shape) -> Shape:
        """Shape of the unsharded parameter; its file may lack rows that pad the vocabulary."""
        header = self.checkpoint.header
        degrees = header.get("checkpoint_parallel_dimensions") or {}
        size = degrees.get("tp_degree", self.checkpoint.model_ranks)
        shape = unsharded_shape(name, local, tensor_size=size)
        tensor = self._stored(name, "fp32")
        stored = tensor.numel()
        if size > 1 and may_be_gated(name) and is_gated(self.checkpoint.shapes):
            self._require_halves(name)
        if tensor.dim() > 1 and tuple(tensor.shape[1:]) != shape[1:]:
            raise CheckpointError(
                f"{self.path}: {FOLDER}/{name}/fp32.pt has the shape {tuple(tensor.shape)}, "
                f"expected {shape}: tensor-parallel parts were merged along another dimension. "
                "Convert the ZeRO checkpoint again, with patterns that say how each was cut."
            )
        row = numel(shape[1:])
        if stored != numel(shape) and (stored % row or stored > numel(shape)):
            raise CheckpointError(
                f"{self.path}: {FOLDER}/{name}/fp32.pt has {stored} elements, but the model files "
                f"give the parameter the shape {shape}. Convert again."
            )
        return shape

    def _require_halves(self, name: str) -> None:
        """Check that gate and up halves were merged separately, which the shape does not show."""
        file = self.path / FOLDER / name / "fp32.pt"
        kept = torch_pickle.load(file)
        if not isinstance(kept, dict) or kept.get("param_n_sub_params") != 2:
            raise CheckpointError(
                f"{file}: tensor-parallel parts of a gate and an up half were merged as if they "
                "were one. Convert the ZeRO checkpoint again with "
                "parameter_with_2_sub_params_cat_dim_0."
            )

    def _step(self, name: str) -> Tensor:
        """The steps that a parameter has taken; after ZeRO-3 one file holds it for all."""
        file = self.path / FOLDER / name / "step.pt"
        if file.is_file():
            return torch.as_tensor(torch_pickle.load(file), dtype=torch.float32).reshape(())
        state = (self._optimizer.get("optimizer_state_dict") or {}).get("state") or {}
        taken = state[0]["step"] if 0 in state else self.checkpoint.header["global_steps"]
        return torch.as_tensor(taken, dtype=torch.float32).reshape(())
