"""The training state inside a running DeepSpeed engine, by the same containers as on disk.

It can be overwritten in place, through the path that writes shards, and read to be written out.  No
address changes, so process groups, buffers and captured graphs stay.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from lag_megatron.checkpoint.state.loss_scale import LossScale
from lag_megatron.checkpoint.state.optimizer_states import state_shape, states_of
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.zero.writer import write_rank
from lag_megatron.engine.base_cache import KeptBase, Target
from lag_megatron.engine.sync_weights import follow_masters, own_weights
from lag_megatron.errors import PlanError
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.kernels.grow import write_runs

# What DeepSpeed counts, under the same names in its engine and in its checkpoints.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# The hyper-parameters that DeepSpeed's loader takes from a checkpoint.
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "beta2_decay", "d")


class LiveState:
    """One rank's part of the state.

    Args:
        engine: DeepSpeed's.
        layout: where the trained parameters lie under ``topology``.
        topology: of the engine.
        place: of this rank.
    """

    def __init__(self, engine: Any, layout: Layout, topology: Topology, place: Rank) -> None:
        self._engine, self._layout, self._topology = engine, layout, topology
        self._place = place
        self._layouts = layout.states

    def require(self, growth: GrownState, *, weights_only: bool = False) -> None:
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
        expected = [self._layout.lengths[c] for c in self._layout.held(self._data_rank)]
        found = [master.numel() for master in self.masters]
        if found != expected or not all(master.is_contiguous() for master in self.masters):
            raise PlanError(
                f"DeepSpeed's buffers have {found} elements, expected {expected}: this version of "
                "DeepSpeed cuts them in a way that is not understood here."
            )

    def overwrite(self, growth: GrownState, base: KeptBase | None = None) -> bool:
        """Take over masters, moments, counters and hyper-parameters; no collective call.

        What fails here has spoilt the state: load one before going on.

        Args:
            growth: what the state becomes.
            base: what is kept of the growth's source, if anything.

        Returns:
            whether this rank's forward weights were brought up to the masters on the way.

        Raises:
            CheckpointError: if a file of the source turns out to be damaged.
        """
        source, optimizer = growth.source, self._engine.optimizer
        groups = source.group_states
        for number, master in self._numbered_masters():
            self._moments(master)["step"].fill_(groups[number].counters["step"])
        for group, taken in zip(self.inner.param_groups, groups, strict=True):
            group.update({k: taken.settings[k] for k in _SETTINGS if k in taken.settings})
        written = self._write_values(growth, base)
        scale = source.loss_scale(self._topology.precision)
        if self._topology.zero_stage:
            vars(optimizer.loss_scaler).update(vars(scale.as_object()))
        elif self._topology.precision != "fp32":
            vars(optimizer.loss_scale_config).update(scale.as_entries())
        for counter in _COUNTERS:
            setattr(self._engine, counter, source.header[counter])
        return written

    def _write_values(self, growth: GrownState, base: KeptBase | None) -> bool:
        """Masters and moments: by one launch from what is kept, else from the shards."""
        fill = growth.filler(tensor_rank=self._place["tensor_rank"])
        if base is not None:
            runs = base.runs(growth, fill, list(self._targets()))
            if runs is not None:
                write_runs(runs)
                return True
        for region, _, tensor in self._regions():
            fill(region, tensor)
        return False

    def take_weights(self, growth: GrownState) -> None:
        """Take over masters alone; no collective call."""
        fill = growth.filler(tensor_rank=self._place["tensor_rank"])
        for container, held in self._layout.held(self._data_rank).items():
            region = Region("fp32", held, self._layout.lengths[container])
            fill(region, self._buffer(self.masters[container.key], "fp32"))

    def refresh(self, *, written: bool = False) -> None:
        """Bring the forward weights up to the masters, together with all replicas.

        With ``written`` this rank's own part of them is, and has only to reach the others.
        """
        follow_masters(
            self._engine.optimizer,
            self._topology,
            self.masters,
            data_rank=self._data_rank,
            written=written,
        )

    def write(
        self, folder: Path, growth: GrownState, *, client_state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write this rank's files of a state that began as ``growth``; no collective call.

        Returns:
            their manifest entries; commit is the caller's.
        """
        entries = {counter: getattr(self._engine, counter) for counter in _COUNTERS}
        draft = replace(
            growth.draft,
            entries={**entries, "lag": {**growth.client_state, **client_state}},
            groups=self._group_states(),
            loss_scale=self._loss_scale(),
        )
        return write_rank(folder, draft, self, **self._place)

    def expect(self, region: Region) -> None:
        """Nothing has to be read: the state is in memory."""

    def __call__(self, region: Region, buffer: Tensor) -> None:
        """Read a region of this rank's part, for a file of this rank."""
        if sum(segment.length for _, segment in region.segments) < region.length:
            buffer.zero_()
        for name, segment in region.segments:
            there, start = self._find(name, region, segment.container, segment.start)
            part = there[start : start + segment.length]
            buffer[segment.offset : segment.offset + segment.length].copy_(part)

    def _group_states(self) -> list[GroupState]:
        """What the optimizer keeps for each parameter group."""
        first: dict[int, Tensor] = {}
        for number, master in self._numbered_masters():
            first.setdefault(number, master)
        return [
            GroupState(
                {key: value for key, value in group.items() if key != "params"},
                {"step": self._moments(first[number])["step"].detach().cpu().clone()},
            )
            for number, group in enumerate(self.inner.param_groups)
        ]

    def _loss_scale(self) -> LossScale:
        """What gradients are multiplied by."""
        optimizer = self._engine.optimizer
        if self._topology.zero_stage:
            return LossScale.of_object(optimizer.loss_scaler)
        if self._topology.precision == "fp32":
            return LossScale()
        return LossScale.of_entries(vars(optimizer.loss_scale_config))

    def _find(
        self, name: str, region: Region, container: Container, start: int
    ) -> tuple[Tensor, int]:
        """The live buffer with element ``start`` of a parameter, and where it stands there."""
        if region.forward:
            return self._weights[name].detach().view(-1), start
        (segment,) = self._layouts[region.state].overlapping(name, start, 1)
        buffer = self._buffer(self.masters[container.key], region.state)
        return buffer, segment.offset + start - segment.start

    def _regions(self) -> Iterator[tuple[Region, int, Tensor]]:
        """What every buffer holds, its number, and its values."""
        masters = self.masters
        for state, layout in self._layouts.items():
            for container, held in layout.held(self._data_rank).items():
                tensor = self._buffer(masters[container.key], state)
                yield Region(state, held, layout.lengths[container]), container.key, tensor

    def _targets(self) -> Iterator[Target]:
        """The buffers, masters with the forward weights that follow them."""
        weights = own_weights(self._engine.optimizer, self._topology, data_rank=self._data_rank)
        for region, key, tensor in self._regions():
            yield Target(region, tensor, weights[key] if region.state == "fp32" else None)

    @property
    def _data_rank(self) -> int:
        """Whose buffers of the layout these are; without ZeRO every replica has all."""
        return self._place["data_rank"] if self._topology.zero_stage else 0

    def _numbered_masters(self) -> Iterator[tuple[int, Tensor]]:
        """Each buffer of masters with the number of its parameter group."""
        stage, layout = self._topology.zero_stage, self._layout
        if stage == 0:
            group_of = [number for number, group in enumerate(layout.groups) for _ in group]
        elif stage == 3:
            group_of = [number for number, _ in layout.subgroups]
        else:
            group_of = list(range(len(layout.groups)))
        yield from zip(group_of, self.masters, strict=True)

    def _buffer(self, master: Tensor, state: State) -> Tensor:
        tensor = master if state == "fp32" else self._moments(master)[state]
        return tensor.detach().view(-1)

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """A buffer's optimizer state; torch makes it at the first step, which may not have been."""
        state: dict[str, Tensor] = self.inner.state[master]
        moments = states_of(self._layout.optimizer, tuple(master.shape))[1:]
        if moments[0] not in state:
            # Fused kernels read the count where the parameters are.
            fused = any(
                group.get("fused") or group.get("capturable") for group in self.inner.param_groups
            )
            place = master.device if fused else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            for moment in moments:
                shape = state_shape(moment, tuple(master.shape))
                state[moment] = torch.zeros(shape, dtype=master.dtype, device=master.device)
        return state

    def parts(
        self, wanted: Callable[[str], bool], *, moments: bool = False
    ) -> dict[int, list[Tensor]]:
        """This rank's masters of some parameters, and their moments where these are asked for.

        They are runs of the buffers that belong to the masters with these identities.
        """
        masters = self.masters
        found: dict[int, list[Tensor]] = {id(master): [] for master in masters}
        for state, layout in self._layouts.items():
            if state != "fp32" and not moments:
                continue
            for container, held in layout.held(self._data_rank).items():
                master = masters[container.key]
                buffer = self._buffer(master, state)
                found[id(master)] += [
                    buffer[part.offset : part.offset + part.length]
                    for name, part in held
                    if wanted(name)
                ]
        return found

    @property
    def inner(self) -> Any:
        """The torch optimizer."""
        optimizer = self._engine.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    @property
    def _weights(self) -> dict[str, Tensor]:
        return dict(self._engine.module.named_parameters())

    @property
    def masters(self) -> list[Tensor]:
        """This rank's buffers of fp32 weights, which the optimizer steps on."""
        optimizer = self._engine.optimizer
        if self._topology.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if self._topology.zero_stage in (1, 2):
            return list(optimizer.single_partition_of_fp32_groups)
        if self._topology.precision == "fp32":
            return [p for group in optimizer.param_groups for p in group["params"]]
        return [p for group in optimizer.fp32_groups for p in group]
