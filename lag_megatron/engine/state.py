"""The training state inside a running DeepSpeed engine, addressed by the containers of its files.

It can be overwritten in place, by the code that writes shards, and read to be written to files.  No
address changes, so process groups, buffers and captured graphs stay.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.families.layer_stack import largest_stack
from lag_megatron.checkpoint.state.compatibility import (
    require_same_optimizer,
    require_same_parameters,
)
from lag_megatron.checkpoint.state.layout import (
    Container,
    GroupState,
    Layout,
    Rank,
    State,
    Topology,
)
from lag_megatron.checkpoint.state.optimizer_states import state_shape, states_of
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.zero.writer import write_rank
from lag_megatron.engine.base_cache import BaseCache, Target
from lag_megatron.engine.deepspeed_adapter import DeepSpeedAdapter
from lag_megatron.errors import PlanError
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.kernels.grow import write_runs

# The hyper-parameters that DeepSpeed's loader takes from a checkpoint.
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "beta2_decay", "d")


class EngineState:
    """One rank's part of the state.

    Args:
        adapter: of the engine.
        layout: where the trained parameters lie under ``topology``.
        topology: of the engine.
        place: of this rank.
    """

    def __init__(
        self, adapter: DeepSpeedAdapter, layout: Layout, topology: Topology, place: Rank
    ) -> None:
        self._adapter, self._layout, self._topology = adapter, layout, topology
        self._place = place
        self._layouts = layout.states

    def require_compatible(self, growth: GrownState, *, weights_only: bool = False) -> None:
        """Refuse a growth that ends at another model or topology, before anything is touched.

        With ``weights_only`` it may be of another optimizer.

        Raises:
            PlanError: if it ends at another topology.
            CheckpointError: if it ends at other parameters, naming them, or is of another
                optimizer.
        """
        if growth.topology != self._topology:
            raise PlanError(
                f"the growth ends at {growth.topology}, but this engine has {self._topology}."
            )
        require_same_parameters(growth.source.path, growth.layout.groups, self._layout.groups)
        if not weights_only:
            require_same_optimizer(growth.source.path, growth.layout, self._layout)
        expected = [self._layout.lengths[c] for c in self._layout.buffers_of_rank(self._data_rank)]
        found = [master.numel() for master in self.masters]
        if found != expected or not all(master.is_contiguous() for master in self.masters):
            raise PlanError(
                f"DeepSpeed's buffers have {found} elements, expected {expected}: this version of "
                "DeepSpeed cuts them in a way that is not understood here."
            )

    def overwrite(self, growth: GrownState, base: BaseCache | None = None) -> bool:
        """Overwrite masters, moments, counters and hyper-parameters; no collective call.

        After an error the state is neither the old nor the new one: load one before going on.

        Args:
            growth: what the state becomes.
            base: the cache of the growth's source, if there is one.

        Returns:
            whether this rank's model weights were overwritten too.

        Raises:
            CheckpointError: if a file of the source turns out to be damaged.
        """
        source = growth.source
        groups = source.group_states
        for number, master in self._numbered_masters():
            _set_step(self._moments(master), groups[number].counters["step"])
        for group, source_group in zip(self.torch_optimizer.param_groups, groups, strict=True):
            settings = source_group.settings
            group.update({key: settings[key] for key in _SETTINGS if key in settings})
        written = self._write_values(growth, base)
        self._adapter.loss_scale = source.loss_scale(self._topology.precision)
        self._adapter.set_counters(source.header)
        return written

    def _write_values(self, growth: GrownState, base: BaseCache | None) -> bool:
        """Masters and moments: by one kernel launch from the cache, else from the shards."""
        fill = growth.filler(tensor_rank=self._place["tensor_rank"])
        if base is not None:
            runs = base.runs(growth, fill, list(self._targets()))
            if runs is not None:
                write_runs(runs)
                return True
        for region, _, tensor in self.regions():
            fill(region, tensor)
        return False

    def overwrite_weights(self, growth: GrownState) -> None:
        """Overwrite masters alone; no collective call."""
        fill = growth.filler(tensor_rank=self._place["tensor_rank"])
        for container, held in self._layout.buffers_of_rank(self._data_rank).items():
            region = Region("fp32", held, self._layout.lengths[container])
            fill(region, self._buffer(self.masters[container.key], "fp32"))

    def sync_weights(self, *, written: bool = False) -> None:
        """Bring the model's weights up to the masters, together with all replicas.

        With ``written`` this rank's own part is up to date, and only has to reach the others.
        """
        self._adapter.sync_weights(written=written)

    def write(
        self, folder: Path, growth: GrownState, *, client_state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write this rank's files of a state that began as ``growth``; no collective call.

        Returns:
            their manifest entries; commit is the caller's.
        """
        spec = replace(
            growth.spec,
            entries={**self._adapter.counters, "lag": {**growth.client_state, **client_state}},
            groups=self._group_states(),
            loss_scale=self._adapter.loss_scale,
        )
        return write_rank(folder, spec, self, **self._place)

    def prefetch(self, region: Region) -> None:
        """Nothing has to be read: the state is in memory."""

    def __call__(self, region: Region, buffer: Tensor) -> None:
        """Read a region of this rank's part, for a file of this rank."""
        if sum(segment.length for _, segment in region.segments) < region.length:
            buffer.zero_()
        for name, segment in region.segments:
            source, start = self._find(name, region, segment.container, segment.start)
            part = source[start : start + segment.length]
            buffer[segment.offset : segment.offset + segment.length].copy_(part)

    def _group_states(self) -> list[GroupState]:
        """Each parameter group's hyper-parameters and step count."""
        first: dict[int, Tensor] = {}
        for number, master in self._numbered_masters():
            first.setdefault(number, master)
        steps = {
            number: torch.as_tensor(self._moments(master)["step"])
            for number, master in first.items()
        }
        return [
            GroupState(
                {key: value for key, value in group.items() if key != "params"},
                {"step": steps[number].detach().cpu().clone()},
            )
            for number, group in enumerate(self.torch_optimizer.param_groups)
        ]

    def _find(
        self, name: str, region: Region, container: Container, start: int
    ) -> tuple[Tensor, int]:
        """The buffer with element ``start`` of a parameter, and that element's offset."""
        if region.forward:
            return self._parameters[name].detach().view(-1), start
        (segment,) = self._layouts[region.state].overlapping(name, start, 1)
        buffer = self._buffer(self.masters[container.key], region.state)
        return buffer, segment.offset + start - segment.start

    def regions(self) -> Iterator[tuple[Region, int, Tensor]]:
        """What every buffer holds, its number, and its values."""
        masters = self.masters
        for state, layout in self._layouts.items():
            for container, held in layout.buffers_of_rank(self._data_rank).items():
                tensor = self._buffer(masters[container.key], state)
                yield Region(state, held, layout.lengths[container]), container.key, tensor

    def _targets(self) -> Iterator[Target]:
        """The buffers, masters with the model's weights that follow them."""
        weights = self._adapter.weights
        for region, key, tensor in self.regions():
            yield Target(region, tensor, weights[key] if region.state == "fp32" else None)

    @property
    def _data_rank(self) -> int:
        """Whose buffers of the layout these are; without ZeRO every replica has all."""
        return self._place["data_rank"] if self._topology.zero_stage else 0

    def _numbered_masters(self) -> Iterator[tuple[int, Tensor]]:
        """Each buffer of masters with the number of its parameter group."""
        yield from zip(self._adapter.master_groups, self.masters, strict=True)

    def _buffer(self, master: Tensor, state: State) -> Tensor:
        tensor: Tensor = master if state == "fp32" else self._moments(master)[state]
        return tensor.detach().view(-1)

    def _moments(self, master: Tensor) -> dict[str, Any]:
        """A buffer's optimizer state; torch makes it at the first step, which may not have been."""
        state: dict[str, Any] = self.torch_optimizer.state[master]
        moments = states_of(self._layout.optimizer, tuple(master.shape))[1:]
        if moments[0] not in state:
            # Fused kernels read the count where the parameters are.
            fused = any(
                group.get("fused") or group.get("capturable")
                for group in self.torch_optimizer.param_groups
            )
            place = master.device if fused else torch.device("cpu")
            if type(self.torch_optimizer).__module__.startswith("torch."):
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            else:  # DeepSpeed's Adam counts in an int
                state["step"] = 0
            for moment in moments:
                shape = state_shape(moment, tuple(master.shape))
                state[moment] = torch.zeros(shape, dtype=master.dtype, device=master.device)
        return state

    def slices(
        self, wanted: Callable[[str], bool], *, moments: bool = False
    ) -> dict[int, list[Tensor]]:
        """This rank's masters of some parameters, and their moments if ``moments``.

        Args:
            wanted: whether a parameter of this name is one of them.
            moments: whether to add their moments.

        Returns:
            views of the buffers, by the identity (``id``) of the buffer of masters that they are
            of or whose moments they are.
        """
        masters = self.masters
        found: dict[int, list[Tensor]] = {id(master): [] for master in masters}
        for state, layout in self._layouts.items():
            if state != "fp32" and not moments:
                continue
            for container, held in layout.buffers_of_rank(self._data_rank).items():
                master = masters[container.key]
                buffer = self._buffer(master, state)
                found[id(master)] += [
                    buffer[part.offset : part.offset + part.length]
                    for name, part in held
                    if wanted(name)
                ]
        return found

    def in_layers(self, layers: Collection[int]) -> Callable[[str], bool]:
        """Whether a parameter of a given name belongs to one of these layers."""
        stack = largest_stack(self._layout.shapes)

        def belongs(name: str) -> bool:
            match = stack.match(name) if stack else None
            return match is not None and match.layer in layers

        return belongs

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps."""
        return self._adapter.torch_optimizer

    @property
    def _parameters(self) -> dict[str, Tensor]:
        return dict(self._adapter.module.named_parameters())

    @property
    def masters(self) -> list[Tensor]:
        """This rank's buffers of fp32 weights, which the optimizer steps on."""
        return self._adapter.masters


def _set_step(state: dict[str, Any], step: Tensor | float) -> None:
    """Set the steps taken; torch's Adam keeps them in a tensor, DeepSpeed's in an int."""
    if isinstance(state["step"], Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = int(step)
