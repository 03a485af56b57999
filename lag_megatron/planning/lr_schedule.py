"""The learning rate of each step: a pure function of the configuration."""

import math
from dataclasses import dataclass

from lag_megatron.config import RunConfig
from lag_megatron.config.schema.stage_schedule import (
    decay_end,
    decay_start,
    last_growth,
    start_positions,
)


@dataclass(frozen=True, slots=True)
class Rate:
    """Learning rate of one step.

    Attributes:
        lr: of all parameters, or of those that are not in new layers.
        new_layers: factor on ``lr`` for the parameters of new layers, from 0 to 1.
    """

    lr: float
    new_layers: float = 1.0


def rate_at(step: int, config: RunConfig) -> Rate:
    """The rate of the optimizer step with 0-based index ``step`` of the whole run.

    It is the schedule's at that step's position.  For ``growth_warmup_steps`` w after a growth it
    is multiplied by 1/w, 2/w, ..., 1, as Staged Training does (Shen et al. 2022, arXiv 2203.06211):
    for all parameters, or with ``growth_warmup: new`` for those of the new layers.
    """
    schedule = config.optimizer.schedule
    lr, rise = scheduled_lr(schedule_position(step, config), config), 1.0
    grown_at = last_growth(config, step)
    if grown_at is not None and step - grown_at < schedule.growth_warmup_steps:
        rise = (step - grown_at + 1) / schedule.growth_warmup_steps
    return Rate(lr, rise) if schedule.growth_warmup == "new" else Rate(lr * rise)


def schedule_position(step: int, config: RunConfig) -> int:
    """Position of the run's step ``step`` in the schedule, in steps from 0."""
    position = first = 0
    for start, stage in zip(start_positions(config), config.stages, strict=True):
        if step >= first:
            position = start + step - first
        first += stage.steps
    return position


def scheduled_lr(position: int, config: RunConfig) -> float:
    """The schedule's learning rate at a position, counted in steps from 0.

    Warm-up is linear in all: position 0 takes ``lr / warmup_steps``, position ``warmup_steps - 1``
    the full rate.  Then ``constant`` stays there, and ``inverse_sqrt`` takes ``lr *
    sqrt(warmup_steps / (position + 1))``, but never less than ``min_lr`` (Vaswani et al. 2017,
    section 5.3; Raffel et al. 2020, section 3.1.2).  The others fall to ``min_lr`` at
    ``decay_steps`` and stay there: ``linear``; ``cosine`` (Loshchilov and Hutter 2017, equation 5,
    without restarts); and ``wsd``, which keeps the full rate up to ``stable_steps`` and then falls
    linearly (Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4, where the fall is exponential;
    linear is Hägele et al. 2024's, arXiv 2405.18392).
    """
    peak, schedule = config.optimizer.lr, config.optimizer.schedule
    if position < schedule.warmup_steps:
        return peak * (position + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return max(peak * math.sqrt(schedule.warmup_steps / (position + 1)), schedule.min_lr)
    begin, end = decay_start(config), decay_end(config)
    if position >= end:
        return schedule.min_lr
    progress = max(position - begin, 0) / (end - begin)
    height = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.min_lr + (peak - schedule.min_lr) * height
