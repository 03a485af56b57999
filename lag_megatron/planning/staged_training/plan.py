"""Staged Training's schedule by the scaling law: how long to train which size, and what it saves.

Shen et al. 2022, arXiv 2203.06211, section 4: a small model trains until its slope reaches the
threshold of its growth, at S_grow; grown, it enters the large model's schedule at S_grow / rho and
trains until that one's threshold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from lag_megatron.errors import PlanError
from lag_megatron.planning.staged_training.scaling_law import ScalingLaw

GrowthKind = Literal["depth", "width", "both"]

# Slopes at which a stage ends, for doubling; found by hand, says Staged Training's notebook.
GROWTH_SLOPES: Mapping[GrowthKind, float] = {"depth": -0.0575, "width": -0.0475, "both": -0.03}
OPTIMAL_SLOPE = -0.052
BEST: Literal["best"] = "best"  # the law's own threshold

Threshold = float | Literal["best"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's layers and hidden size, with an MLP of four times that.

    Raises:
        PlanError: one is below 1.
    """

    num_layers: int
    hidden_size: int

    def __post_init__(self) -> None:
        if min(self.num_layers, self.hidden_size) < 1:
            raise PlanError(f"shape {self}: expected at least 1 layer and a hidden size of 1.")

    def __str__(self) -> str:
        return f"{self.num_layers}L/{self.hidden_size}"

    @property
    def parameters(self) -> int:
        """Without embeddings, biases and norms: 12 L d^2 (Kaplan et al. 2020, section 2.1)."""
        return 12 * self.num_layers * self.hidden_size**2

    def growth_to(self, larger: "ModelShape") -> GrowthKind:
        """What grows from here to ``larger``.

        Raises:
            PlanError: nothing, or something shrinks.
        """
        deeper = larger.num_layers - self.num_layers
        wider = larger.hidden_size - self.hidden_size
        if deeper < 0 or wider < 0 or deeper == wider == 0:
            raise PlanError(
                f"stages {self} -> {larger}: each stage must be deeper or wider than the one "
                f"before and neither shallower nor narrower. Put the sizes in rising order."
            )
        return "both" if deeper and wider else "depth" if deeper else "width"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """One size's part of the schedule; steps are positions in that size's own schedule.

    Attributes:
        growth: what grew into this shape; None for the first.
        ratio: rho of that growth; None for the first.
        entered: the position at which the stage begins.
        ended: the position at which it grows or ends.
        until_slope: d log L / d log C there.
        loss: in nats a token, there.
        critical_batch: in tokens, there.
        compute: floating-point operations of this stage alone.
    """

    shape: ModelShape
    growth: GrowthKind | None
    ratio: float | None
    entered: float
    ended: float
    until_slope: float
    loss: float
    critical_batch: float
    compute: float

    @property
    def steps(self) -> int:
        """Optimizer steps to train."""
        return round(self.ended) - round(self.entered)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """Stages, and the last size trained from scratch to the same loss."""

    stages: tuple[PlannedStage, ...]
    scratch_steps: float
    scratch_compute: float

    @property
    def compute(self) -> float:
        """Floating-point operations of all stages."""
        return sum(stage.compute for stage in self.stages)

    @property
    def saving(self) -> float:
        """The share of the compute from scratch that the stages do without."""
        return 1 - self.compute / self.scratch_compute


def plan_stages(
    shapes: Sequence[ModelShape],
    *,
    law: ScalingLaw,
    optimal: Threshold = OPTIMAL_SLOPE,
    slopes: Mapping[GrowthKind, Threshold] = GROWTH_SLOPES,
    ratios: Mapping[GrowthKind, float] | None = None,
) -> StagePlan:
    """When to grow from each shape to the next.

    Args:
        shapes: one or more, each larger than the one before.
        law: the loss by size and step.
        optimal: the slope at which the last stage ends; ``best`` is the law's frontier.
        slopes: per kind of growth, the slope at which the stage before it ends; ``best`` is where
            the law saves most.
        ratios: measured rho in place of the law's, per kind of growth.

    Raises:
        PlanError: sizes do not rise, a threshold or ratio is not possible, or a stage would enter
            its schedule after its own end.
    """
    kinds = [small.growth_to(large) for small, large in pairwise(shapes)]
    last = law.frontier_slope if optimal == BEST else optimal
    stages: list[PlannedStage] = []
    for number, shape in enumerate(shapes):
        until = last
        if number < len(kinds):
            until = _growth_slope(law, shape, shapes[number + 1], slopes[kinds[number]])
        growth, ratio = None, None
        if stages:
            growth = kinds[number - 1]
            ratio = _ratio(law, stages[-1], shape, (ratios or {}).get(growth))
        stages.append(_stage(law, shape, growth, ratio, stages[-1:], until))
    end = law.step_at_slope(shapes[-1].parameters, last)
    return StagePlan(
        stages=tuple(stages),
        scratch_steps=end,
        scratch_compute=law.compute(shapes[-1].parameters, end),
    )


def stages_yaml(plan: StagePlan) -> str | None:
    """The plan as ``stages`` of a configuration; None where it is not doubled depth throughout."""
    items = [f"{{steps: {plan.stages[0].steps}}}"]
    for before, stage in pairwise(plan.stages):
        layers = stage.shape.num_layers
        if stage.growth != "depth" or layers != 2 * before.shape.num_layers:
            return None
        items.append(
            f"{{steps: {stage.steps}, num_layers: {layers}, rewind: {stage.ratio:.6g}, "
            f"growth: {{pool: {{operator: staged}}}}}}"
        )
    first = plan.stages[0].shape
    head = f"model: {{num_layers: {first.num_layers}, hidden_size: {first.hidden_size}}}\nstages:\n"
    return head + "\n".join(f"  - {item}" for item in items)


def _growth_slope(law: ScalingLaw, small: ModelShape, large: ModelShape, slope: Threshold) -> float:
    if slope == BEST:
        return law.best_growth_slope(large.parameters / small.parameters)
    return slope


def _ratio(
    law: ScalingLaw, before: PlannedStage, shape: ModelShape, measured: float | None
) -> float:
    if measured is None:
        growth = shape.parameters / before.shape.parameters
        return law.growth_ratio(growth, before.until_slope)
    if not 1 <= measured < math.inf:
        raise PlanError(f"growth ratio {measured}: expected a finite number of 1 or more.")
    return measured


def _stage(
    law: ScalingLaw,
    shape: ModelShape,
    growth: GrowthKind | None,
    ratio: float | None,
    before: Sequence[PlannedStage],
    until: float,
) -> PlannedStage:
    size = shape.parameters
    entered = before[0].ended / ratio if before and ratio else 0.0
    ended = law.step_at_slope(size, until)
    if round(ended) <= round(entered):
        raise PlanError(
            f"stage {shape}: it enters its schedule at step {entered:,.0f}, at or after its own "
            f"end at step {ended:,.0f} (slope {until:.4g}). Grow into it at a steeper slope, or "
            f"end it at a flatter one."
        )
    loss = law.loss(size, ended)
    return PlannedStage(
        shape=shape,
        growth=growth,
        ratio=ratio,
        entered=entered,
        ended=ended,
        until_slope=until,
        loss=loss,
        critical_batch=law.critical_batch(loss),
        compute=law.compute(size, ended) - (law.compute(size, entered) if entered else 0.0),
    )
