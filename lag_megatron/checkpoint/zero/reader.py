"""DeepSpeed's ZeRO checkpoints, stages 0 to 3, read shard by shard.

The layout is derived from the parameter shapes in the model file, and compared with the lengths of
the buffers: flat buffers carry no names, so a wrong order would load without an error.  A ZeRO-1
checkpoint in bf16 with one group, a (5 elements) and b (4), on two data-parallel ranks::

    file                                              flat buffers of group 0
    mp_rank_00_model_states.pt                        none: param_shapes = [{a: (5,), b: (4,)}]
    bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt    fp32 6, exp_avg 6, exp_avg_sq 6 elements
    bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt    fp32 3, exp_avg 6, exp_avg_sq 6 elements

The group's 9 elements are padded to 12, 6 on each rank; masters are stored without the padding.
``elements(0, Container(1, 0), "fp32", trained=True)`` then maps b1 b2 b3 from the last file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.state.layout import (
    Container,
    GroupState,
    Layout,
    ParamGroup,
    State,
    Topology,
    frozen_layout,
    make_layout,
)
from lag_megatron.checkpoint.state.loss_scale import LossScale
from lag_megatron.checkpoint.state.optimizer_states import Optimizer
from lag_megatron.checkpoint.state.source import MappedElements
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import EVERYTHING, VerifyScope, require_sound
from lag_megatron.checkpoint.storage.page_cache import disable_readahead
from lag_megatron.checkpoint.zero.file_names import (
    files_of,
    group_states,
    model_file,
    optimizer_file,
    state_buffer,
    step_counts,
    torch_optimizer_state,
)
from lag_megatron.checkpoint.zero.header import (
    aliases,
    frozen_shapes,
    join_subgroups,
    read_header,
    require_listed_once,
    trained_groups,
)
from lag_megatron.checkpoint.zero.load import (
    load_states,
    optimizer_of,
    require_buffer_lengths,
    require_known_states,
    require_own_files,
    require_same_list,
    require_same_slices,
)
from lag_megatron.errors import CheckpointError


@dataclass(frozen=True)
class ZeroCheckpoint:
    """A checkpoint whose headers are read and whose tensors are still on disk.

    Attributes:
        path: the tag directory.
        topology: how it is sharded.
        header: the objects of the model file of tensor rank 0, data rank 0.
    """

    path: Path
    topology: Topology
    header: Mapping[str, Any] = field(repr=False)

    @staticmethod
    def open(path: Path) -> "ZeroCheckpoint":
        """Read a tag directory's header and check that all its files are there.

        Raises:
            CheckpointError: if it is not a DeepSpeed checkpoint, incomplete, or written with
                options that are not supported.
        """
        if manifest.is_committed(path):
            manifest.check_sizes(path)
        header, topology = read_header(path)
        missing = [f for f in files_of(topology) if not (path / f).is_file()]
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(files_of(topology))} files are missing "
                f"({', '.join(missing[:3])}). Restore them, or use another tag."
            )
        require_own_files(path, topology)
        return ZeroCheckpoint(path, topology, header)

    @property
    def client_state(self) -> dict[str, Any]:
        """The entries of this program's trainer; empty for checkpoints of other programs."""
        return dict(self.header.get("lag") or {})

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.header["global_steps"])

    @cached_property
    def groups(self) -> list[ParamGroup]:
        """Names and one tensor-parallel rank's shapes by parameter group, in flat order."""
        return self.parameter_groups(0)

    @cached_property
    def layout(self) -> Layout:
        """The layout of trained parameters."""
        try:
            return make_layout(self.groups, self.topology, self.optimizer)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose states these are."""
        return "adamw" if self.topology.zero_stage else optimizer_of(self.topology, self.header)

    @cached_property
    def frozen(self) -> Layout:
        """The layout of parameters that are not trained."""
        return frozen_layout(frozen_shapes(self.header, self.layout.shapes), self.topology)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Further names of shared parameters, with the name that owns the values."""
        return aliases(self.header)

    def parameter_groups(self, tensor_rank: int) -> list[ParamGroup]:
        """Names and shapes in the model file of one tensor-parallel rank.

        Raises:
            CheckpointError: if the file does not list its parameters in their order.
        """
        header = self._load(model_file(self.topology, tensor_rank=tensor_rank, data_rank=0))
        listed = trained_groups(self.path, header)
        others = (header.get(key) or () for key in ("frozen_param_shapes", "shared_params"))
        require_listed_once(self.path, [*listed, *others])
        if self.topology.zero_stage != 3:
            return listed
        return join_subgroups(listed, self._load(self._optimizer_file(tensor_rank, 0)))

    @cached_property
    def group_states(self) -> list[GroupState]:
        """The optimizer's settings and counters by parameter group."""
        states = self.optimizer_states(0, 0) if self.topology.zero_stage else None
        return group_states(self.topology, self.header, states)

    def loss_scale(self, precision: str) -> LossScale:
        """The loss scaling with which training continues in a precision."""
        if precision != "fp16":
            return LossScale()
        if self.topology.precision != "fp16":
            return LossScale.initial((self.header.get("ds_config") or {}).get("fp16") or {})
        if self.topology.zero_stage == 0:
            return LossScale.of_entries(self.header["optimizer"])
        optimizer = self.optimizer_states(0, 0)["optimizer_state_dict"]
        return LossScale.of_object(optimizer["loss_scaler"])

    def check_every_file(self) -> None:
        """Read every file's header and check its layout, optimizer and step.

        Raises:
            CheckpointError: naming the first file that differs or is cut short.
        """
        for tensor_rank in range(self.topology.tensor_size):
            for data_rank in range(self.topology.data_size):
                self.model_states(tensor_rank, data_rank)
                if self.topology.zero_stage:
                    self.optimizer_states(tensor_rank, data_rank)

    def model_states(self, tensor_rank: int, data_rank: int) -> Any:
        """The objects of a model file, after checks of its step and its list of parameters."""
        if self.topology.zero_stage != 3:
            data_rank = 0
        name = model_file(self.topology, tensor_rank=tensor_rank, data_rank=data_rank)
        states = self._load(name)
        if states.get("global_steps") != self.step:
            raise self._other_step(name, states.get("global_steps"), self.step)
        if name not in self._checked:
            require_same_list(self.path / name, states, self.header)
            if self.topology.zero_stage == 0:
                require_buffer_lengths(
                    self.path / name, self.layout, self.topology, states, None, 0
                )
                inner = torch_optimizer_state(self.topology, states, None)
                require_known_states(self.path / name, inner, self.optimizer)
            self._checked.add(name)
        return states

    def optimizer_states(self, tensor_rank: int, data_rank: int) -> Any:
        """The objects of an optimizer file, after checks of its layout and its step."""
        name = self._optimizer_file(tensor_rank, data_rank)
        states = self._load(name)
        if name not in self._checked:
            require_buffer_lengths(
                self.path / name, self.layout, self.topology, None, states, data_rank
            )
            require_same_slices(self.path / name, states, self.layout.buffers_of_rank(data_rank))
            inner = torch_optimizer_state(self.topology, None, states)
            require_known_states(self.path / name, inner, self.optimizer)
            first = self._load(self._optimizer_file(0, 0))
            counts = [step_counts(self.topology, s) for s in (states, first)]
            if counts[0] != counts[1]:
                raise self._other_step(name, *counts)
            self._checked.add(name)
        return states

    def elements(
        self, tensor_rank: int, container: Container, state: State, *, trained: bool
    ) -> MappedElements:
        """A flat buffer of one state, mapped from disk."""
        if trained:
            return MappedElements(self._buffer(tensor_rank, container, state))
        return MappedElements(self._frozen_buffer(tensor_rank, container))

    def require_sound(self, scope: VerifyScope = EVERYTHING) -> None:
        """Verify the content against its checksums; raises ``CheckpointError``."""
        require_sound(self.path, scope.share(files_of(self.topology)), states=scope.states)

    def _buffer(self, tensor_rank: int, container: Container, state: State) -> Tensor:
        model = self.model_states(tensor_rank, container.data_rank)
        states = (
            None
            if self.topology.zero_stage == 0
            else self.optimizer_states(tensor_rank, container.data_rank)
        )
        names = list(self.layout.shapes)
        buffer = state_buffer(self.topology, model, states, container.key, state, names)
        return disable_readahead(
            buffer.detach()
        )  # masters ask for gradients, copies of them do not

    def _frozen_buffer(self, tensor_rank: int, container: Container) -> Tensor:
        """The flat values of a parameter that is not trained, or of one rank's shard of it."""
        name = list(self.frozen.shapes)[container.key]
        model = self.model_states(tensor_rank, container.data_rank)
        where = "frozen_param_fragments" if self.topology.zero_stage == 3 else "module"
        values = model[where][name]
        expected = self.frozen.lengths[container]
        if values.numel() != expected:
            raise CheckpointError(
                f"{self.path}: the part of the frozen parameter {name} on rank "
                f"{container.data_rank} has {values.numel()} elements, expected {expected}. "
                "Restore the checkpoint, or use another tag."
            )
        return values.contiguous().view(-1)  # type: ignore[no-any-return]

    def _optimizer_file(self, tensor_rank: int, data_rank: int) -> str:
        return str(optimizer_file(self.topology, tensor_rank=tensor_rank, data_rank=data_rank))

    def _load(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = load_states(self.path / name)
        return self._files[name]

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {model_file(self.topology, tensor_rank=0, data_rank=0): self.header}

    @cached_property
    def _checked(self) -> set[str]:
        return set()

    def _other_step(self, name: str, found: object, expected: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path / name}: of step {found}, but the first file is of step {expected}: "
            "files of different checkpoints are mixed. Restore the right one, or use another tag."
        )
