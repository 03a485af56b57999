"""A stage plan, and the published figures next to the law's, as JSON values."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lag_megatron.planning.staged_training.plan import (
    GrowthKind,
    ModelShape,
    PlannedStage,
    StagePlan,
    stages_yaml,
)
from lag_megatron.planning.staged_training.published import (
    BASE,
    FACTORS,
    LARGE,
    compare_published,
    halved,
)
from lag_megatron.planning.staged_training.scaling_law import ScalingLaw, learning_rate

NO_WIDTH = "Width is planned by the law only: this project has no operator that widens yet."
NOT_DOUBLED = "No configuration: the operator 'staged' only doubles the number of layers."

Planner = Callable[[Sequence[ModelShape]], StagePlan]


def plan_data(
    plan: StagePlan,
    law: ScalingLaw,
    *,
    measured_ratios: bool,
    tokens_per_step: int | None,
    log_base: float,
) -> dict[str, Any]:
    """A plan in numbers, with its ``stages`` of a configuration as YAML where there are any.

    Args:
        law: by which it was planned.
        measured_ratios: whether a ratio was given instead of the law's.
        tokens_per_step: tokens of a global batch; None leaves out the tokens of the stages.
        log_base: of the learning rate's formula.
    """
    widened = any(stage.growth in ("width", "both") for stage in plan.stages)
    text = stages_yaml(plan)
    return {
        "law": asdict(law),
        "defaults": law == ScalingLaw(),
        "measured_ratios": measured_ratios,
        "tokens_per_step": tokens_per_step,
        "stages": [_stage_data(stage, tokens_per_step, log_base) for stage in plan.stages],
        "compute": plan.compute,
        "scratch": {"steps": round(plan.scratch_steps), "compute": plan.scratch_compute},
        "saving": plan.saving,
        "yaml": text,
        "note": None if text else NO_WIDTH if widened else NOT_DOUBLED,
    }


def published_data(law: ScalingLaw, planner: Planner, *, log_base: float) -> dict[str, Any]:
    """The growths of the published sizes by ``planner``, and every published figure with the law's.

    Args:
        planner: plans stages of the given shapes.
        log_base: of the learning rate's formula.
    """
    growths = [
        _growth_data(planner, growth, target) for target in (BASE, LARGE) for growth in FACTORS
    ]
    found = [asdict(check) for check in compare_published(law, log_base=log_base)]
    return {"law": asdict(law), "growths": growths, "checks": found, "note": NO_WIDTH}


def _stage_data(
    stage: PlannedStage, tokens_per_step: int | None, log_base: float
) -> dict[str, Any]:
    size = stage.shape.parameters
    return {
        **asdict(stage.shape),
        "parameters": size,
        "growth": stage.growth,
        "ratio": stage.ratio,
        "enters_at_step": round(stage.entered),
        "ends_at_step": round(stage.ended),
        "steps": stage.steps,
        "tokens": None if tokens_per_step is None else stage.steps * tokens_per_step,
        "until_slope": stage.until_slope,
        "loss": stage.loss,
        "critical_batch_tokens": stage.critical_batch,
        "compute": stage.compute,
        "learning_rate": learning_rate(size, log_base=log_base),
    }


def _growth_data(planner: Planner, growth: GrowthKind, target: ModelShape) -> dict[str, Any]:
    plan = planner([halved(target, growth), target])
    small, large = plan.stages
    return {
        "growth": growth,
        "small": str(small.shape),
        "large": str(large.shape),
        "until_slope": small.until_slope,
        "grows_at_step": round(small.ended),
        "enters_at_step": round(large.entered),
        "ends_at_step": round(large.ended),
        "ratio": large.ratio,
        "saving": plan.saving,
    }
