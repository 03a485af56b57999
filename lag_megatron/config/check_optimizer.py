"""What the optimizer and its learning rate must satisfy."""

import math
from collections.abc import Iterator

from lag_megatron.config.schema import RunConfig


def optimizer_problems(config: RunConfig) -> Iterator[str]:
    """Contradictions in the optimizer's settings, one line each."""
    optimizer, schedule = config.optimizer, config.optimizer.schedule
    for number, beta in enumerate(optimizer.betas):
        if not 0 <= beta < 1:
            yield f"optimizer.betas.{number}: must be in [0, 1) (got {beta})."
    for path, value in (
        ("optimizer.weight_decay", optimizer.weight_decay),
        ("optimizer.grad_clip", optimizer.grad_clip),
        ("optimizer.schedule.warmup_steps", schedule.warmup_steps),
        ("optimizer.schedule.min_lr", schedule.min_lr),
    ):
        if not 0 <= value < math.inf:
            yield f"{path}: must be finite and not negative (got {value})."
    if schedule.min_lr > optimizer.lr:
        yield (
            f"optimizer.schedule.min_lr: {schedule.min_lr} is above optimizer.lr {optimizer.lr}."
        )
    if schedule.decay_steps is not None and schedule.decay_steps <= schedule.warmup_steps:
        yield (
            f"optimizer.schedule.decay_steps: {schedule.decay_steps} must be after warmup_steps "
            f"{schedule.warmup_steps}."
        )
