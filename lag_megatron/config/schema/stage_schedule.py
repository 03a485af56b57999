"""The length of each stage, and its position in the learning rate schedule."""

from collections.abc import Sequence
from dataclasses import replace

from lag_megatron.config.schema.run import RunConfig, StageConfig


def stage_ranges(stages: Sequence[StageConfig]) -> tuple[range, ...]:
    """For each stage, the global 0-based indices of its optimizer steps."""
    ranges: list[range] = []
    start = 0
    for stage in stages:
        ranges.append(range(start, start + stage.steps))
        start += stage.steps
    return tuple(ranges)


def in_steps(config: RunConfig) -> RunConfig:
    """``config`` with the length of every stage in steps."""
    # At least 1: an empty batch is reported by the validation that follows.
    per_step = max(1, config.parallel.global_batch * config.model.seq_length)
    stages = tuple(
        stage
        if stage.tokens is None
        else replace(stage, steps=-(-stage.tokens // per_step), tokens=None)
        for stage in config.stages
    )
    return replace(config, stages=stages)


def start_positions(config: RunConfig) -> tuple[int, ...]:
    """For each stage, the position in the schedule, in steps from 0, of its first step.

    A stage goes on from the one before, unless its ``schedule_position`` puts it elsewhere, as
    Staged Training does (Shen et al. 2022, arXiv 2203.06211, section 4): a grown model then gets
    the rate of the step at which a model trained at its size from the start has its loss.
    """
    positions: list[int] = []
    position = 0
    for stage in config.stages:
        if stage.schedule_position is not None:
            position = stage.schedule_position
        elif stage.rewind is not None:
            position = round(position / stage.rewind)
        positions.append(position)
        position += stage.steps
    return tuple(positions)


def decay_end(config: RunConfig) -> int:
    """The position at which the decay ends: the one given, or the furthest that the run comes."""
    schedule = config.optimizer.schedule
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    starts = start_positions(config)
    return max(start + stage.steps for start, stage in zip(starts, config.stages, strict=True))


def decay_start(config: RunConfig) -> int:
    """The position at which the decay begins: after the warm-up, or ``wsd``'s stable part."""
    schedule = config.optimizer.schedule
    if schedule.name != "wsd":
        return schedule.warmup_steps
    if schedule.stable_steps is not None:
        return schedule.stable_steps
    return max(schedule.warmup_steps, decay_end(config) * 4 // 5)


def last_growth(config: RunConfig, step: int) -> int | None:
    """The global step, from 0, that was the first after the last growth before step ``step``."""
    first, found = 0, None
    for number, stage in enumerate(config.stages):
        if first > step:
            break
        if config.grows(number):
            found = first
        first += stage.steps
    return found
