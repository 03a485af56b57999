"""A growth plan bound to a checkpoint: the grown state, of which nothing is written yet."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lag_megatron import __version__
from lag_megatron.checkpoint.families.layer_stack import (
    LayerStack,
    count_layers,
    largest_stack,
)
from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.layout import (
    Layout,
    ParamGroup,
    Topology,
    frozen_layout,
    make_layout,
)
from lag_megatron.checkpoint.state.source import CheckpointSource, unsharded_shapes
from lag_megatron.checkpoint.state.spec import CheckpointSpec
from lag_megatron.checkpoint.state.tensor_parallel import (
    cut_dim,
    is_gated,
    local_shape,
    unsharded_shape,
)
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.writer.context import DEFAULT_CONTEXT, WriteContext
from lag_megatron.checkpoint.zero.writer import bytes_of, write_rank
from lag_megatron.config.schema.ranges import MAX_RANKS, require_whole
from lag_megatron.errors import PlanError
from lag_megatron.growth.apply.aliases import grown_aliases
from lag_megatron.growth.apply.fill import GrowthFiller
from lag_megatron.growth.growth_map import Copy, GrowthMap, grown_names, growth_map_of
from lag_megatron.growth.plan import GrowthPlan

_PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class GrownState:
    """The training state that a plan makes of a checkpoint, under any topology.

    Attributes:
        source: the checkpoint to grow; it is never changed.
        plan: the growth plan.
        target: topology of the grown state; the source's by default.
        allow_nonfinite: whether values may be NaN or infinite.

    Raises:
        PlanError: when the plan or the topology does not fit the checkpoint.
    """

    source: CheckpointSource
    plan: GrowthPlan
    target: Topology | None = None
    allow_nonfinite: bool = False

    @property
    def topology(self) -> Topology:
        """Topology of the grown state."""
        return self.target or self.source.topology

    @cached_property
    def growth_map(self) -> GrowthMap:
        """The source of each grown parameter's values."""
        return growth_map_of(
            self.plan,
            self._unsharded_groups,
            self._unsharded(self.source.frozen.shapes),
            query_groups=self._query_groups,
            others=[name for name in self.source.header["module"] if isinstance(name, str)],
        )

    @cached_property
    def stack(self) -> LayerStack | None:
        """The layers of the source."""
        return largest_stack(self._unsharded_shapes, self.plan.names)

    @cached_property
    def layout(self) -> Layout:
        """The layout of trained parameters."""
        groups = [self._local(group) for group in self.growth_map.groups]
        if self.source.optimizer == "adafactor":
            self._refuse_parts()
        try:
            return make_layout(groups, self.topology, self.source.optimizer)
        except ValueError as error:
            raise PlanError(f"{self.source.path}: {error}") from None

    @cached_property
    def frozen(self) -> Layout:
        """The layout of parameters that are not trained."""
        return frozen_layout(self._local(self.growth_map.frozen), self.topology)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the grown state's tensors, all ranks together."""
        return bytes_of(self.topology, self.layout, self.frozen)

    def filler(self, *, tensor_rank: int) -> GrowthFiller:
        """The filler of one target tensor-parallel rank."""
        return GrowthFiller(
            self.growth_map,
            self.source,
            self.topology,
            (self.layout, self.frozen),
            shapes=self._unsharded_shapes,
            gated=self._gated,
            tensor_rank=tensor_rank,
            allow_nonfinite=self.allow_nonfinite,
        )

    def write_rank(
        self,
        folder: Path,
        *,
        tensor_rank: int,
        data_rank: int,
        context: WriteContext = DEFAULT_CONTEXT,
    ) -> dict[str, Any]:
        """Write one rank's files into ``folder`` and return their manifest entries by name."""
        return write_rank(
            folder,
            self.spec,
            self.filler(tensor_rank=tensor_rank),
            tensor_rank=tensor_rank,
            data_rank=data_rank,
            context=context,
        )

    @cached_property
    def spec(self) -> CheckpointSpec:
        """The specification of the grown checkpoint."""
        names = {name: name for name in self.source.header["module"]}
        if self.plan.operator != "identity":
            names = {
                new: old
                for new, old, _ in grown_names(list(names), self.plan.layer_map, self.stack)
            }
        return CheckpointSpec(
            topology=self.topology,
            layout=self.layout,
            frozen=self.frozen,
            template=self.source,
            names=names,
            aliases=grown_aliases(self.source, names, self.stack),
            entries={"lag": self.client_state},
            groups=self.source.group_states,
            loss_scale=self.source.loss_scale(self.topology.precision),
        )

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Entries of the grown checkpoint's manifest, beside its files."""
        source = {
            "path": str(self.source.path.absolute()),
            "digest": manifest.digest_of(self.source.path),
        }
        return {
            "step": self.source.step,
            "plan": self.plan.to_dict(),
            "plan_digest": self.plan.digest,
            "growth_history": self.client_state["growth_history"],
            "topology": asdict(self.topology),
            "source": source,
            "versions": {"lag_megatron": __version__, "torch": torch.__version__},
        }

    @cached_property
    def client_state(self) -> dict[str, Any]:
        """The trainer's entries of the source, updated by the plan."""
        state = self.source.client_state
        history = list(state.get("growth_history", []))
        if self.plan.operator != "identity":
            history.append(self.plan.to_dict())
        return {
            **state,
            "num_layers": self.plan.target_layers,
            "parameter_groups": [list(group) for group in self.layout.groups],
            "growth_history": history,
        }

    @cached_property
    def _unsharded_groups(self) -> list[ParamGroup]:
        return [self._unsharded(group) for group in self.source.groups]

    @cached_property
    def _unsharded_shapes(self) -> dict[str, Shape]:
        return unsharded_shapes(self.source)

    @cached_property
    def _gated(self) -> bool:
        return is_gated(self._unsharded_shapes)

    @cached_property
    def _query_groups(self) -> int | None:
        """Query groups of the attention; only checkpoints of this program record them."""
        return (self.source.client_state.get("model") or {}).get("num_query_groups")

    def _unsharded(self, shapes: ParamGroup) -> ParamGroup:
        size = self.source.topology.tensor_size
        return {name: unsharded_shape(name, s, tensor_size=size) for name, s in shapes.items()}

    def _local(self, shapes: ParamGroup) -> dict[str, Shape]:
        size = self.topology.tensor_size
        groups = self._query_groups
        if groups is not None and groups % size:
            raise PlanError(
                f"{self.source.path}: tensor-parallel size {size} does not divide the model's "
                f"{groups} query groups, which stay whole. Choose a size that does."
            )
        if size != self.source.topology.tensor_size:
            self._refuse_unknown_cuts(shapes)
        try:
            return {
                name: local_shape(name, shape, tensor_size=size, gated=self._gated)
                for name, shape in shapes.items()
            }
        except ValueError as error:
            raise PlanError(f"{self.source.path}: {error}") from None

    def _refuse_parts(self) -> None:
        """Refuse maps that join parts of matrices, whose Adafactor means are not known."""
        for name, blocks in self.growth_map.blocks.items():
            for origin in (origin for block in blocks for origin in block.sources.values()):
                if len(blocks) > 1 or (isinstance(origin, Copy) and any(origin.low)):
                    raise PlanError(
                        f"{self.source.path}: operator {self.plan.operator!r} makes {name} of "
                        "parts of matrices, and Adafactor's means of their rows and columns are "
                        "not known. Take an operator that adds layers, or train with adamw."
                    )

    def _refuse_unknown_cuts(self, shapes: ParamGroup) -> None:
        """Refuse to reshard matrices that the table of tensor parallelism does not list."""
        for name, shape in shapes.items():
            if self.stack and self.stack.match(name) and len(shape) > 1 and cut_dim(name) is None:
                raise PlanError(
                    f"{self.source.path}: it is not known how tensor parallelism cuts {name}, so "
                    f"the {self.source.topology.tensor_size} tensor-parallel ranks cannot become "
                    f"{self.topology.tensor_size}. Keep their number."
                )


def resharded(
    source: CheckpointSource, target: Topology, *, allow_nonfinite: bool = False
) -> GrownState:
    """The same state under another topology: a grown state of the operator ``identity``."""
    layers = count_layers(unsharded_shapes(source))
    plan = GrowthPlan(operator="identity", source_layers=layers, target_layers=layers)
    return GrownState(source, plan, target, allow_nonfinite)


def retarget(
    source: Topology,
    *,
    world_size: int | None = None,
    tensor_size: int | None = None,
    zero_stage: int | None = None,
    precision: str | None = None,
) -> Topology:
    """The source's topology with the given values replaced; ``world_size`` counts all ranks.

    Raises:
        PlanError: for impossible values, or if the ranks do not divide into tensor-parallel groups.
    """
    for name, number in (("--world-size", world_size), ("--tensor-parallel", tensor_size)):
        if number is not None:
            require_whole(number, name, error=PlanError, least=1, most=MAX_RANKS)
    if zero_stage is not None:
        require_whole(zero_stage, "--zero-stage", error=PlanError, most=3)
    if precision not in (None, *_PRECISIONS):
        raise PlanError(
            f"--precision: expected one of {', '.join(_PRECISIONS)} (got {precision!r})."
        )
    tensor = source.tensor_size if tensor_size is None else tensor_size
    world = source.data_size * source.tensor_size if world_size is None else world_size
    if world % tensor:
        raise PlanError(
            f"{world} ranks cannot be split into tensor-parallel groups of {tensor}. Give a "
            f"--world-size that {tensor} divides, or another --tensor-parallel."
        )
    return replace(
        source,
        data_size=world // tensor,
        tensor_size=tensor,
        zero_stage=source.zero_stage if zero_stage is None else zero_stage,
        precision=source.precision if precision is None else precision,  # type: ignore[arg-type]
    )
