"""Making the values of any run of elements of a grown training state.

This is the one path that every sink shares: shards on disk, and the tensors of a live engine.
"""

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.layout import Container, Layout, State, Topology
from lag_megatron.checkpoint.state.optimizer_states import state_shape
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.state.source import CheckpointSource, Elements
from lag_megatron.growth.apply.copy_plan import Draw, Move, Side, StridedSlice, plan_rank
from lag_megatron.growth.growth_map import GrowthMap
from lag_megatron.growth.weight_init import fill


class Filler:
    """Fills regions of one target tensor rank from a source, by a growth map.

    Args:
        growth: what each new element is made of.
        source: where old ones are read.
        topology: of the target.
        layouts: of the target's trained and frozen parameters; only their shapes matter.
        shapes: whole shapes of all old parameters.
        gated: whether fc1 holds a gate and an up half.
        tensor_rank: of the target.
    """

    def __init__(
        self,
        growth: GrowthMap,
        source: CheckpointSource,
        topology: Topology,
        layouts: tuple[Layout, Layout],
        *,
        shapes: Mapping[str, Shape],
        gated: bool,
        tensor_rank: int,
    ) -> None:
        self._growth, self._source, self._tensor_rank = growth, source, tensor_rank
        grown = {n: s for group in (*growth.groups, growth.frozen) for n, s in group.items()}
        old = (source.layout, source.frozen)
        self._sides = {
            (trained, state): (
                Side(theirs, source.topology, _of_state(shapes, state), gated),
                Side(here.states[state], topology, _of_state(grown, state), gated),
            )
            for trained, there, here in zip((True, False), old, layouts, strict=True)
            for state, theirs in there.states.items()
        }
        # A region is planned when it is announced and, if it is small, at once filled.
        self._planned = threading.local()
        self._buffers: dict[tuple[bool, int, Container, State], Elements] = {}

    def sides(self, *, trained: bool, state: State = "fp32") -> tuple[Side, Side]:
        """Source and target of a state, as plans see them, of trained or of frozen parameters."""
        return self._sides[trained, state]

    def expect(self, region: Region) -> None:
        """Begin to read from disk what the region needs."""
        for step in self.plan(region):
            if isinstance(step, Move):
                there = self.elements(region, step.tensor_rank, step.source.container)
                strides = step.source.strides
                last = sum((n - 1) * s for n, s in zip(step.shape, strides, strict=True))
                there.expect(step.source.offset, last + 1)

    def __call__(self, region: Region, buffer: Tensor) -> None:
        """Write the region's values; ``buffer`` is flat and of its length, in any precision."""
        if sum(segment.length for _, segment in region.segments) < region.length:
            buffer.zero_()
        for step in self.plan(region):
            view = _view(buffer, step.target, step.shape)
            if isinstance(step, Move):
                there = self.elements(region, step.tensor_rank, step.source.container)
                origin = there.strided(step.shape, step.source.strides, step.source.offset)
                _copy(view, origin, step.scale)
            else:
                fill(view, step.fresh, shape=step.whole, box=step.box)

    def plan(self, region: Region) -> list[Move | Draw]:
        """What has to be done for a region; a thread's last one is remembered."""
        last = getattr(self._planned, "last", None)
        if last is not None and last[0] == region:
            return last[1]  # type: ignore[no-any-return]
        plan = self._made(region)
        self._planned.last = region, plan
        return plan

    def _made(self, region: Region) -> list[Move | Draw]:
        return plan_rank(
            self._growth,
            *self.sides(trained=region.trained, state=region.state),
            region.state,
            segments=region.segments,
            tensor_rank=self._tensor_rank,
        )

    def elements(self, region: Region, tensor_rank: int, container: Container) -> Elements:
        """The values that a move of a region's plan is from."""
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
        # Rounded once, whatever the target's precision: as a scaled master would be.
        target.copy_(torch.mul(source, scale))
