"""Growing a sharded checkpoint: each target rank runs its own copies, mapped file to mapped file.

No process holds the model: source shards are mapped, target shards are mapped, and fresh values are
drawn in small pieces.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron import __version__
from lag_megatron.checkpoint import commit
from lag_megatron.checkpoint.boxes import Shape
from lag_megatron.checkpoint.layout import (
    STATES,
    Container,
    Group,
    Layout,
    Segment,
    State,
    Topology,
    make_layout,
    whole_parameters,
)
from lag_megatron.checkpoint.tensor_parallel import local_shape, whole_shape
from lag_megatron.checkpoint.zero import ZeroCheckpoint
from lag_megatron.checkpoint.zero_write import RankWriter, bytes_of
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.growth.fresh import fill
from lag_megatron.growth.growth_map import GrowthMap, depth_map, grown_names
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.transfer import Move, Place, Side, plan_rank

Rank = tuple[int, int]


@dataclass(frozen=True)
class Growth:
    """A plan bound to a source checkpoint: everything is known, nothing is written.

    Attributes:
        source: the checkpoint to grow; it is never changed.
        plan: what to do.

    Raises:
        PlanError: when the plan does not fit the checkpoint.
    """

    source: ZeroCheckpoint
    plan: GrowthPlan

    @property
    def topology(self) -> Topology:
        """The topology of the grown checkpoint, the same as the source's."""
        return self.source.topology

    @cached_property
    def growth_map(self) -> GrowthMap:
        """What each grown parameter is made of."""
        return depth_map(self.plan, self._whole_groups)

    @cached_property
    def layout(self) -> Layout:
        """Where everything will lie."""
        size = self.topology.tensor_size
        groups = [
            {n: local_shape(n, s, tensor_size=size) for n, s in group.items()}
            for group in self.growth_map.groups
        ]
        return make_layout(groups, self.topology)

    @property
    def bytes_to_write(self) -> int:
        """Size of the grown checkpoint's tensors, all ranks together."""
        return bytes_of(self.topology, self.layout)

    def write_rank(self, folder: Path, *, tensor_rank: int, data_rank: int) -> dict[str, Any]:
        """Write one rank's files into ``folder`` and return their manifest entries by name."""
        writer = RankWriter(
            folder,
            self.topology,
            self.layout,
            tensor_rank=tensor_rank,
            data_rank=data_rank,
            template=self.source,
            origins=self._module_origins(tensor_rank),
            client_state=self.client_state,
        )
        self._write_states(writer)
        self._write_weights(writer)
        return writer.finish()

    def publish(self, path: Path, files: Mapping[str, Any]) -> None:
        """Commit the grown checkpoint once all its ranks are written."""
        commit.publish(path, files=files, about=self._about)

    def was_published(self, path: Path) -> bool:
        """Whether ``path`` is this growth's result, made by an earlier run."""
        if not commit.is_committed(path):
            return False
        manifest = commit.read_manifest(path)
        return all(manifest.get(k) == self._about[k] for k in ("step", "plan_digest", "source"))

    @cached_property
    def _about(self) -> dict[str, Any]:
        source: dict[str, Any] = {"path": str(self.source.path.absolute())}
        if commit.is_committed(self.source.path):
            source["digest"] = commit.digest(commit.read_manifest(self.source.path))
        return {
            "step": self.source.step,
            "plan": asdict(self.plan),
            "plan_digest": self.plan.digest,
            "source": source,
            "versions": {"lag_megatron": __version__, "torch": torch.__version__},
        }

    @cached_property
    def client_state(self) -> dict[str, Any]:
        """The trainer's entries of the source, brought up to date."""
        state = self.source.client_state
        history = [*state.get("growth_history", []), asdict(self.plan)]
        return {
            **state,
            "num_layers": self.plan.target_layers,
            "parameter_groups": [list(group) for group in self.layout.groups],
            "growth_history": history,
        }

    @cached_property
    def _whole_groups(self) -> list[Group]:
        size = self.source.topology.tensor_size
        return [
            {name: whole_shape(name, shape, tensor_size=size) for name, shape in group.items()}
            for group in self.source.groups
        ]

    @cached_property
    def _gated(self) -> bool:
        """Whether fc1 holds a gate and an up half: then it has twice the rows fc2 has columns."""
        shapes = {name: shape for group in self._whole_groups for name, shape in group.items()}
        for name, shape in shapes.items():
            if name.endswith("mlp.linear_fc1.weight"):
                down = shapes[name.replace("linear_fc1", "linear_fc2")]
                return shape[0] == 2 * down[1]
        return False

    @cached_property
    def _source_side(self) -> Side:
        shapes = {name: shape for group in self._whole_groups for name, shape in group.items()}
        return Side(self.source.layout, self.source.topology, shapes, self._gated)

    def _target_side(self, layout: Layout) -> Side:
        groups = self.growth_map.groups
        shapes = {name: shape for group in groups for name, shape in group.items()}
        return Side(layout, self.topology, shapes, self._gated)

    def _module_origins(self, tensor_rank: int) -> dict[str, str]:
        module = self.source.model_states(tensor_rank, 0)["module"]
        return {name: old for name, old, _ in grown_names(list(module), self.plan.layer_map)}

    def _write_states(self, writer: RankWriter) -> None:
        containers = set(writer.containers())
        segments = [(n, s) for n, s in self.layout.of_rank(writer.data_rank)
                    if s.container in containers]  # fmt: skip
        for state in STATES:
            targets = {c: writer.buffer(c, state) for c in containers}
            for container, buffer in targets.items():
                buffer[self.layout.filled[container] :].zero_()
            self._run(self.layout, state, segments, targets, writer.tensor_rank)

    def _write_weights(self, writer: RankWriter) -> None:
        """The forward weights are the fp32 masters, rounded to their precision."""
        layout = whole_parameters(self.layout.shapes)
        targets: dict[Container, Tensor] = {}
        segments: list[tuple[str, Segment]] = []
        for name, parts in layout.segments.items():
            weight = writer.weight(name)
            if weight is not None:
                targets[parts[0].container] = weight
                segments += [(name, part) for part in parts]
        self._run(layout, "fp32", segments, targets, writer.tensor_rank)

    def _run(
        self,
        layout: Layout,
        state: State,
        segments: Sequence[tuple[str, Segment]],
        targets: Mapping[Container, Tensor],
        tensor_rank: int,
    ) -> None:
        steps = plan_rank(
            self.growth_map,
            self._source_side,
            self._target_side(layout),
            state,
            segments=segments,
            tensor_rank=tensor_rank,
        )
        sources: dict[tuple[int, Container], Tensor] = {}
        for step in steps:
            view = _view(targets[step.target.container], step.target, step.shape)
            if isinstance(step, Move):
                key = (step.tensor_rank, step.source.container)
                if key not in sources:
                    sources[key] = self.source.buffer(*key, state)
                _copy(view, _view(sources[key], step.source, step.shape), step.scale)
            else:
                fill(view, step.fresh, shape=step.whole, box=step.box)


def grow_checkpoint(
    source: Path,
    target: Path,
    plan: GrowthPlan,
    *,
    progress: Callable[[Iterable[Rank]], Iterable[Rank]] = iter,
) -> Growth:
    """Grow a whole checkpoint in this process, rank by rank, and commit it.

    Args:
        source: tag directory.
        target: tag directory to come; it must not exist.
        plan: what to do.
        progress: wraps the iteration over ranks, e.g. ``tqdm``.

    Raises:
        PlanError: when the plan does not fit the checkpoint or the target exists.
        CheckpointError: when the source is damaged or the disk too small.
    """
    growth = Growth(ZeroCheckpoint.open(source), plan)
    needed = growth.bytes_to_write
    draft = commit.temporary(target)
    if target.exists():
        if not growth.was_published(target):
            raise PlanError(f"{target}: exists already. Name another target or remove it.")
        commit.point_latest(target)  # killed between the two, or asked for twice
        return growth
    try:
        commit.remove(draft)
        draft.mkdir(parents=True)
        commit.require_space(draft, needed=needed, what="the grown checkpoint")
        growth.publish(target, _write_all(growth, draft, progress))
    except OSError as error:
        commit.remove(draft)
        raise CheckpointError(
            f"{target}: cannot write there: {error.strerror}. Name another target."
        ) from None
    except BaseException:
        commit.remove(draft)
        raise
    return growth


def _write_all(
    growth: Growth, folder: Path, progress: Callable[[Iterable[Rank]], Iterable[Rank]]
) -> dict[str, Any]:
    topology = growth.topology
    ranks = list(itertools.product(range(topology.tensor_size), range(topology.data_size)))
    files: dict[str, Any] = {}
    for tensor_rank, data_rank in progress(ranks):
        files |= growth.write_rank(folder, tensor_rank=tensor_rank, data_rank=data_rank)
    return files


def _view(buffer: Tensor, place: Place, shape: Shape) -> Tensor:
    return buffer.as_strided(shape, place.strides, buffer.storage_offset() + place.offset)


def _copy(target: Tensor, source: Tensor, scale: float) -> None:
    target.copy_(source)
    if scale != 1.0:
        target.mul_(scale)
