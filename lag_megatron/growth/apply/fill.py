"""Making the values of any region of a grown training state.

Every target uses this: shards on disk, other formats, and the tensors of a live engine.
"""

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.finite import all_finite, nonfinite_values
from lag_megatron.checkpoint.state.layout import Container, Layout, State, Topology
from lag_megatron.checkpoint.state.optimizer_states import adam_state_of, state_shape
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.state.source import CheckpointSource, Elements
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.growth.apply.copy_plan import Draw, Move, ShardedModel, StridedSlice, plan_rank
from lag_megatron.growth.growth_map import Copy, GrowthMap
from lag_megatron.growth.weight_init import fill

_ALLOW = "To go on with them: --allow-nonfinite (allow_nonfinite=True in a program)."


class GrowthFiller:
    """Fills regions of one target tensor-parallel rank from a source, by a growth map.

    Args:
        growth_map: the source of each grown parameter's values.
        source: the checkpoint that is read.
        topology: of the target.
        layouts: of the target's trained and frozen parameters; only their shapes are used.
        shapes: unsharded shapes of all old parameters.
        gated: whether fc1 holds a gate and an up half.
        tensor_rank: of the target.
        allow_nonfinite: go on where values are NaN or infinite.
    """

    def __init__(
        self,
        growth_map: GrowthMap,
        source: CheckpointSource,
        topology: Topology,
        layouts: tuple[Layout, Layout],
        *,
        shapes: Mapping[str, Shape],
        gated: bool,
        tensor_rank: int,
        allow_nonfinite: bool = False,
    ) -> None:
        self._growth_map, self._source, self._tensor_rank = growth_map, source, tensor_rank
        self._allow_nonfinite = allow_nonfinite
        grown = {
            n: s for group in (*growth_map.groups, growth_map.frozen) for n, s in group.items()
        }
        old = (source.layout, source.frozen)
        self._sides = {
            (trained, state): (
                ShardedModel(theirs, source.topology, _of_state(shapes, state), gated),
                ShardedModel(here.states[state], topology, _of_state(grown, state), gated),
            )
            for trained, there, here in zip((True, False), old, layouts, strict=True)
            for state, theirs in there.states.items()
        }
        # A region is planned for `prefetch` and, if it is small, filled right after.
        self._planned = threading.local()
        self._buffers: dict[tuple[bool, int, Container, State], Elements] = {}

    def sides(self, *, trained: bool, state: State = "fp32") -> tuple[ShardedModel, ShardedModel]:
        """Source and target of a state, of trained or of frozen parameters."""
        return self._sides[trained, state]

    def prefetch(self, region: Region) -> None:
        """Start to read from disk what the region needs."""
        for step in self.plan(region):
            if isinstance(step, Move):
                there = self.elements(region, step.tensor_rank, step.source.container)
                strides = step.source.strides
                last = sum((n - 1) * s for n, s in zip(step.shape, strides, strict=True))
                there.prefetch(step.source.offset, last + 1)

    def __call__(self, region: Region, buffer: Tensor) -> None:
        """Write the region's values; ``buffer`` is flat and of its length, in any precision.

        Raises:
            CheckpointError: if values of the source are not finite.
            PlanError: if values are too large for the buffer's precision.
        """
        if sum(segment.length for _, segment in region.segments) < region.length:
            buffer.zero_()
        for step in self.plan(region):
            view = _view(buffer, step.target, step.shape)
            if isinstance(step, Move):
                there = self.elements(region, step.tensor_rank, step.source.container)
                origin = there.strided(step.shape, step.source.strides, step.source.offset)
                _copy(view, origin, step.scale)
            else:
                fill(view, step.init, shape=step.full_shape, box=step.box)
        if not (self._allow_nonfinite or all_finite(buffer)):
            self._refuse(region, buffer)

    def _refuse(self, region: Region, buffer: Tensor) -> None:
        """Say which values of a region's parameters are not finite."""
        origins = {
            origin.parameter
            for name, _ in region.segments
            for block in self._growth_map.blocks[name]
            if isinstance(origin := block.sources[adam_state_of(region.state)], Copy)
        }
        for found in nonfinite_values(self._source, names=origins):
            raise CheckpointError(
                f"{self._source.path}: {found}. Training cannot go on from such a state: take an "
                f"older checkpoint. {_ALLOW}"
            )
        names = [
            name
            for name, part in region.segments
            if not all_finite(buffer[part.offset : part.offset + part.length])
        ]
        precision = str(buffer.dtype).removeprefix("torch.")
        raise PlanError(
            f"{self._source.path}: {names[0]} has values beyond {torch.finfo(buffer.dtype).max:.5g}"
            f", the largest of {precision}. Take another precision. {_ALLOW}"
        )

    def plan(self, region: Region) -> list[Move | Draw]:
        """The copy plan of a region; each thread caches its last one."""
        last = getattr(self._planned, "last", None)
        if last is not None and last[0] == region:
            return last[1]  # type: ignore[no-any-return]
        plan = self._made(region)
        self._planned.last = region, plan
        return plan

    def _made(self, region: Region) -> list[Move | Draw]:
        return plan_rank(
            self._growth_map,
            *self.sides(trained=region.trained, state=region.state),
            region.state,
            segments=region.segments,
            tensor_rank=self._tensor_rank,
        )

    def elements(self, region: Region, tensor_rank: int, container: Container) -> Elements:
        """The source values of a move in a region's plan."""
        key = (region.trained, tensor_rank, container, region.state)
        if key not in self._buffers:
            self._buffers[key] = self._source.elements(
                tensor_rank, container, region.state, trained=region.trained
            )
        return self._buffers[key]


def _of_state(shapes: Mapping[str, Shape], state: State) -> dict[str, Shape]:
    return {name: state_shape(state, shape) for name, shape in shapes.items()}


def _view(buffer: Tensor, place: StridedSlice, shape: Shape) -> Tensor:
    return buffer.as_strided(shape, place.strides, buffer.storage_offset() + place.offset)


def _copy(target: Tensor, source: Tensor, scale: float) -> None:
    if scale == 1.0:
        target.copy_(source)
    else:
        # Scaled in the source's precision and rounded once, as a scaled master would be.
        target.copy_(torch.mul(source, scale))
