"""The losses that a training program reports for a trial, checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lag_megatron.config import GrowthConfig
from lag_megatron.errors import RunError
from lag_megatron.search.ask_tell.trial import Trial
from lag_megatron.search.divergence import divergence

Losses = Mapping[int, Any]


@dataclass(frozen=True, slots=True)
class ReportedLosses:
    """What a trial measured.

    Attributes:
        evaluations: lines of the candidate's curve, in order of steps.
        training: steps after growth and their training losses, in order of steps.
        steps: the last step after growth that is known to have been taken.
        failure: why the candidate has lost; empty if it has not.
    """

    evaluations: tuple[dict[str, Any], ...]
    training: tuple[tuple[int, float], ...]
    steps: int
    failure: str


def check_losses(
    trial: Trial, losses: Losses, train_losses: Losses, *, failed: str, growth: GrowthConfig
) -> ReportedLosses:
    """Check what was reported; losses from the first one on that means divergence are dropped.

    Args:
        trial: which steps were asked for.
        losses: by step after growth, the validation loss or those of its batches, in nats.
        train_losses: by step after growth, in nats; steps may be missing.
        failed: why the candidate has failed; then losses may be missing.
        growth: settings of the event.

    Raises:
        RunError: for steps that were not asked for, missing ones, or no number.
    """
    taken = range(trial.first_step + 1, trial.last_step + 1)
    _check_steps(trial, "losses", losses, trial.evaluate_at, f"at {list(trial.evaluate_at)}")
    steps = f"of steps {taken.start} to {trial.last_step}" if taken else "of no step"
    _check_steps(trial, "train_losses", train_losses, taken, steps)
    batches = {step: _numbers(trial, losses[step]) for step in sorted(losses)}
    training = {step: _numbers(trial, train_losses[step])[0] for step in sorted(train_losses)}
    means = {step: math.fsum(values) / len(values) for step, values in batches.items()}
    diverged = [
        (step, reason)
        for what, found in (("training", training), ("validation", means))
        for step, loss in found.items()
        if (reason := divergence(loss, growth, what, step))
    ]
    end, reason = min(diverged, default=(trial.last_step + 1, ""), key=lambda one: one[0])
    failure = failed or reason
    missing = [step for step in trial.evaluate_at if step not in losses]
    if missing and not failure:
        raise RunError(
            f"{trial.id}: no validation loss at {missing}: losses are wanted at steps "
            f"{list(trial.evaluate_at)} after growth. Nothing was recorded."
        )
    known = [step for step in (*means, *training) if step <= end]
    lines = (_line(step, means[step], losses[step], batches[step]) for step in means if step < end)
    return ReportedLosses(
        evaluations=tuple(lines),
        training=tuple((step, loss) for step, loss in training.items() if step < end),
        steps=max(known, default=trial.first_step) if failure else trial.last_step,
        failure=failure,
    )


def _check_steps(
    trial: Trial, name: str, losses: Losses, allowed: Sequence[int], wanted: str
) -> None:
    unknown = sorted(step for step in losses if step not in allowed)
    if unknown:
        raise RunError(
            f"{trial.id}: {name} has steps {unknown}, which were not asked for; wanted are those "
            f"{wanted}, counted from growth. Nothing was recorded."
        )


def _numbers(trial: Trial, value: Any) -> list[float]:
    """The losses of the batches, or the one loss, from numbers, lists, arrays or tensors."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    try:
        numbers = [float(item) for item in plain] if _is_several(plain) else [float(plain)]
    except (TypeError, ValueError):
        numbers = []
    if not numbers:
        raise RunError(
            f"{trial.id}: {value!r} is neither a loss nor a list of losses. Nothing was recorded."
        )
    return numbers


def _is_several(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _line(step: int, mean: float, value: Any, batches: list[float]) -> dict[str, Any]:
    plain = value.tolist() if hasattr(value, "tolist") else value
    line: dict[str, Any] = {"step": step, "val_loss": mean}
    return line | ({"val_loss_batches": batches} if _is_several(plain) else {})
