"""Checks of the optimizer and its learning rate schedule."""

import math
from collections.abc import Iterator

from lag_megatron.config.schema.optimizer import OptimizerConfig
from lag_megatron.config.schema.run import RunConfig
from lag_megatron.config.schema.stage_schedule import decay_end, decay_start, start_positions

_DECAYING = ("linear", "cosine", "wsd")
_SCHEDULE = "optimizer.schedule"


def optimizer_problems(config: RunConfig) -> Iterator[str]:
    """Contradictions in the optimizer's settings, one line each."""
    optimizer, schedule = config.optimizer, config.optimizer.schedule
    for number, beta in enumerate(optimizer.betas):
        if not 0 <= beta < 1:
            yield f"optimizer.betas.{number}: must be in [0, 1) (got {beta})."
    values: dict[str, float | None] = {
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.grad_clip": optimizer.grad_clip,
        f"{_SCHEDULE}.warmup_steps": schedule.warmup_steps,
        f"{_SCHEDULE}.min_lr": schedule.min_lr,
        f"{_SCHEDULE}.growth_warmup_steps": schedule.growth_warmup_steps,
        f"{_SCHEDULE}.stable_steps": schedule.stable_steps,
        **{
            f"stages.{number}.schedule_position": stage.schedule_position
            for number, stage in enumerate(config.stages)
        },
    }
    for path, value in values.items():
        if value is not None and not 0 <= value < math.inf:
            yield f"{path}: must be finite and not negative (got {value})."
    if schedule.min_lr > optimizer.lr:
        yield f"{_SCHEDULE}.min_lr: {schedule.min_lr} is above optimizer.lr {optimizer.lr}."
    yield from _unused(optimizer)
    if schedule.name in _DECAYING:
        yield from _decay(config)
    elif schedule.name == "inverse_sqrt" and schedule.warmup_steps <= 0:
        yield (
            f"{_SCHEDULE}.warmup_steps: inverse_sqrt falls as sqrt(warmup_steps / step) after the "
            f"warm-up, so it needs one (got {schedule.warmup_steps}). The usual value is 10000."
        )
    if optimizer.name == "adafactor":
        yield from _adafactor(config)


def _unused(optimizer: OptimizerConfig) -> Iterator[str]:
    """Options that the schedule does not have."""
    name, schedule = optimizer.schedule.name, optimizer.schedule
    if schedule.growth_warmup == "new" and not schedule.growth_warmup_steps:
        yield (
            f"{_SCHEDULE}.growth_warmup: 'new' has no effect while growth_warmup_steps is 0. Set "
            "the steps, or remove it."
        )
    for option, found, owners in (
        ("decay_steps", schedule.decay_steps is not None, _DECAYING),
        ("stable_steps", schedule.stable_steps is not None, ("wsd",)),
        ("min_lr", schedule.min_lr > 0, (*_DECAYING, "inverse_sqrt")),
    ):
        if found and name not in owners:
            yield (
                f"{_SCHEDULE}.{option}: has no effect with the schedule {name!r}, only with "
                f"{', '.join(owners)}. Remove it, or choose one of them."
            )


def _decay(config: RunConfig) -> Iterator[str]:
    schedule = config.optimizer.schedule
    end, begin = decay_end(config), decay_start(config)
    given = "decay_steps" if schedule.decay_steps is not None else "the run's end at"
    if schedule.decay_steps is not None and end <= schedule.warmup_steps:
        yield (
            f"{_SCHEDULE}.decay_steps: {end} must be after warmup_steps {schedule.warmup_steps}."
        )
    elif schedule.stable_steps is not None and not schedule.warmup_steps <= begin < end:
        yield (
            f"{_SCHEDULE}.stable_steps: {begin} must not be before warmup_steps "
            f"{schedule.warmup_steps}, and be before {given} {end}."
        )
    for number, (position, stage) in enumerate(
        zip(start_positions(config), config.stages, strict=True)
    ):
        if stage.schedule_position is not None and position >= end and schedule.min_lr == 0:
            yield (
                f"stages.{number}.schedule_position: at {position} the schedule has ended ({given} "
                f"{end}) with min_lr 0, so the stage would learn nothing. Choose a position "
                "before, or a min_lr above 0."
            )


def _adafactor(config: RunConfig) -> Iterator[str]:
    optimizer, parallel = config.optimizer, config.parallel
    plain = OptimizerConfig()
    if parallel.zero_stage:
        yield (
            "optimizer.name: adafactor keeps means of each matrix's rows and columns, and ZeRO "
            f"(parallel.zero_stage {parallel.zero_stage}) cuts parameters into flat pieces that "
            "have none. Set parallel.zero_stage: 0, or take adamw."
        )
    if parallel.tensor > 1:
        yield (
            "optimizer.name: adafactor's means and clipping are over whole matrices, and with "
            f"parallel.tensor {parallel.tensor} a rank has a part of each. Set parallel.tensor: 1, "
            "or take adamw."
        )
    for option, found, default in (
        ("betas", optimizer.betas, plain.betas),
        ("eps", optimizer.eps, plain.eps),
    ):
        if found != default:
            yield (
                f"optimizer.{option}: is adamw's and has no effect with adafactor (got {found}). "
                "Remove it."
            )
