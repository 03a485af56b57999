"""The interface through which growth and writers read a checkpoint of any format.

``ZeroCheckpoint`` implements it for DeepSpeed's shards.  Formats that store every parameter under
name answer through ``UnshardedCheckpoint``: they look like the state of one rank without ZeRO.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape
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
from lag_megatron.checkpoint.state.tensor_parallel import unsharded_shape
from lag_megatron.checkpoint.storage.integrity import EVERYTHING, VerifyScope
from lag_megatron.checkpoint.storage.page_cache import read_ahead

# One rank without ZeRO.
UNSHARDED = Topology(zero_stage=0, data_size=1, tensor_size=1, precision="fp32")


class Elements(Protocol):
    """The flat values of one state in one buffer."""

    def strided(self, shape: Shape, strides: Shape, offset: int) -> Tensor:
        """Elements ``offset + sum(i * stride)``, as a view or a new tensor."""

    def prefetch(self, offset: int, count: int) -> None:
        """Start to read ``count`` elements from ``offset`` on."""


@dataclass(frozen=True, slots=True)
class MappedElements:
    """A buffer that is mapped from disk."""

    buffer: Tensor

    def strided(self, shape: Shape, strides: Shape, offset: int) -> Tensor:
        """A view of the buffer."""
        return self.buffer.as_strided(shape, strides, self.buffer.storage_offset() + offset)

    def prefetch(self, offset: int, count: int) -> None:
        """Start to read them into the page cache."""
        read_ahead(self.buffer, offset, count)


class CheckpointSource(Protocol):
    """A training state that can be grown, resharded or written in another format."""

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""

    @property
    def topology(self) -> Topology:
        """How it is sharded."""

    @property
    def header(self) -> Mapping[str, Any]:
        """The entries of a DeepSpeed model file: the checkpoint's own, or defaults."""

    @property
    def client_state(self) -> dict[str, Any]:
        """The entries of this program's trainer; for other checkpoints, what is known of them."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""

    @property
    def groups(self) -> list[ParamGroup]:
        """Names and one tensor-parallel rank's shapes by parameter group, in flat order."""

    @property
    def layout(self) -> Layout:
        """The layout of trained parameters."""

    @property
    def frozen(self) -> Layout:
        """The layout of parameters that are not trained."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose states these are."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of shared parameters, with the name that owns the values."""

    @property
    def group_states(self) -> list[GroupState]:
        """What the optimizer keeps for each parameter group."""

    def loss_scale(self, precision: str) -> LossScale:
        """The loss scaling with which training continues in a precision."""

    def model_states(self, tensor_rank: int, data_rank: int) -> Any:
        """The objects of a model file."""

    def optimizer_states(self, tensor_rank: int, data_rank: int) -> Any:
        """The objects of an optimizer file (ZeRO 1 to 3)."""

    def elements(
        self, tensor_rank: int, container: Container, state: State, *, trained: bool
    ) -> Elements:
        """The values of a state in a buffer."""

    def check_every_file(self) -> None:
        """Check that all files exist and are of one step; raises ``CheckpointError``."""

    def require_sound(self, scope: VerifyScope = EVERYTHING) -> None:
        """Verify the content against its checksums; raises ``CheckpointError``."""


def unsharded_shapes(source: CheckpointSource) -> dict[str, Shape]:
    """Shapes of a source's parameters without any cut, trained ones first."""
    size = source.topology.tensor_size
    parts = {**source.layout.shapes, **source.frozen.shapes}
    return {name: unsharded_shape(name, s, tensor_size=size) for name, s in parts.items()}


ReadFn = Callable[[str, State, int, int], Tensor]
CheckFn = Callable[[VerifyScope], None]


@dataclass(frozen=True, slots=True)
class _Flat:
    """One parameter's values of one state, read a run at a time."""

    read: Callable[[int, int], Tensor]

    def strided(self, shape: Shape, strides: Shape, offset: int) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        return self.read(offset, span).as_strided(shape, strides)

    def prefetch(self, offset: int, count: int) -> None:
        """Nothing: these files keep the kernel's default readahead."""


@dataclass(frozen=True)
class UnshardedCheckpoint:
    """A checkpoint that stores every parameter whole, under its own name.

    Attributes:
        path: its directory.
        header: entries of a DeepSpeed model file, or defaults.
        groups: names and shapes by parameter group.
        group_states: what the optimizer keeps for each.
        read: returns elements ``start .. start + length`` of a parameter's state, flat and
            contiguous, in any floating-point precision.
        untrained: names and shapes of parameters that the optimizer does not train.
        check: verifies the content; raises ``CheckpointError``.
        aliases: further names of shared parameters, with the name that owns the values.
        notes: remarks for the user.
    """

    path: Path
    header: Mapping[str, Any] = field(repr=False)
    groups: list[ParamGroup] = field(repr=False)
    group_states: list[GroupState] = field(repr=False)
    read: ReadFn = field(repr=False)
    untrained: ParamGroup = field(default_factory=dict, repr=False)
    check: CheckFn = field(default=lambda scope: None, repr=False)
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)
    notes: Sequence[str] = ()

    topology = UNSHARDED
    optimizer: Optimizer = "adamw"

    @property
    def client_state(self) -> dict[str, Any]:
        """The entries of this program's trainer."""
        return dict(self.header.get("lag") or {})

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.header["global_steps"])

    @cached_property
    def layout(self) -> Layout:
        """Every parameter in a buffer of its own."""
        return make_layout(self.groups, self.topology)

    @cached_property
    def frozen(self) -> Layout:
        """The same for parameters that are not trained."""
        return frozen_layout(self.untrained, self.topology)

    def loss_scale(self, precision: str) -> LossScale:
        """DeepSpeed's initial state, since these formats do not store it."""
        return LossScale.initial({}) if precision == "fp16" else LossScale()

    def model_states(self, tensor_rank: int, data_rank: int) -> Any:
        """The header."""
        return self.header

    def optimizer_states(self, tensor_rank: int, data_rank: int) -> Any:
        """Raises ``LookupError``: without ZeRO there are no optimizer files."""
        raise LookupError(f"{self.path}: has no optimizer files")

    def elements(
        self, tensor_rank: int, container: Container, state: State, *, trained: bool
    ) -> Elements:
        """A parameter's values."""
        name = list((self.layout if trained else self.frozen).shapes)[container.key]
        return _Flat(lambda start, length: self.read(name, state, start, length))

    def check_every_file(self) -> None:
        """Nothing: every header was read on opening."""

    def require_sound(self, scope: VerifyScope = EVERYTHING) -> None:
        """Verify the content against the format's checksums."""
        self.check(scope)
