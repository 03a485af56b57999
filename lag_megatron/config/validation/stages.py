"""Checks of the lengths of stages and of their positions in the schedule."""

from collections.abc import Iterator

from lag_megatron.config.schema.run import RunConfig

# Schedules whose value at a position does not depend on where the run ends.
_ENDLESS = ("constant", "inverse_sqrt")


def length_problems(config: RunConfig) -> Iterator[str]:
    """Mistakes in how long stages are, found before tokens become steps."""
    if not config.stages:
        yield "stages: at least one stage is needed, e.g. [{steps: 600}]."
    for number, stage in enumerate(config.stages):
        if stage.tokens is None:
            if stage.steps <= 0:
                yield f"stages.{number}.steps: must be above 0 (got {stage.steps})."
        elif stage.steps:
            yield (
                f"stages.{number}: give either steps or tokens (got {stage.steps} steps and "
                f"{stage.tokens} tokens)."
            )
        elif stage.tokens <= 0:
            yield f"stages.{number}.tokens: must be above 0 (got {stage.tokens})."


def position_problems(config: RunConfig) -> Iterator[str]:
    """Mistakes in where stages stand in the schedule, and in what ends them."""
    schedule = config.optimizer.schedule
    for number, stage in enumerate(config.stages):
        if stage.rewind is not None:
            if stage.schedule_position is not None:
                yield f"stages.{number}: give either rewind or schedule_position."
            if number == 0:
                yield "stages.0.rewind: there is no stage before the first. Remove the key."
            if not 1 <= stage.rewind < float("inf"):
                yield f"stages.{number}.rewind: must be 1 or more (got {stage.rewind})."
        if stage.until_slope is None:
            continue
        if not -1 < stage.until_slope < 0:
            yield (
                f"stages.{number}.until_slope: must lie between -1 and 0 (got {stage.until_slope})."
            )
        if number and config.growth_before(number).exhaustive:
            yield (
                f"stages.{number}.until_slope: growth.exhaustive trains candidates to the stage's "
                "end, which is not known beforehand. Remove one of the two."
            )
        if schedule.name not in _ENDLESS and schedule.decay_steps is None:
            yield (
                f"stages.{number}.until_slope: the run's end is not known beforehand, so the decay "
                f"of the schedule {schedule.name!r} needs optimizer.schedule.decay_steps."
            )
