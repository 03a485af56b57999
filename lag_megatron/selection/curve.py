"""Validation losses after growth, and the value that a rung compares candidates by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

RungValue = Literal["last", "mean", "ema"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of a candidate.

    Attributes:
        step: optimizer steps after growth.
        loss: validation loss in nats per token.
        batches: the same of each validation batch, for paired comparisons.
        average_loss: validation loss of the averaged weights; None where there are none.
        average_batches: the same of each validation batch.
    """

    step: int
    loss: float
    batches: tuple[float, ...] = ()
    average_loss: float | None = None
    average_batches: tuple[float, ...] = ()

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Evaluation":
        """A line of ``probe.jsonl``; a loss that JSON could only hold as null is not a number."""
        average = row.get("ema_val_loss")
        return cls(
            step=int(row["step"]),
            loss=_number(row["val_loss"]),
            batches=tuple(map(_number, row.get("val_loss_batches") or ())),
            average_loss=None if average is None else float(average),
            average_batches=tuple(map(_number, row.get("ema_val_loss_batches") or ())),
        )


Curves = Mapping[str, Sequence[Evaluation]]


def rung_value(kind: RungValue, curve: Sequence[Evaluation], rung: int) -> float | None:
    """What a candidate is compared by ``rung`` steps after growth, in nats per token.

    ``last`` is the loss there; ``mean`` that of the evaluations in the second half before it, i.e.
    at steps in (rung / 2, rung]; ``ema`` the loss of the averaged weights there.  None where the
    rung was not evaluated or a loss is missing or not finite.
    """
    losses = [e.average_loss if kind == "ema" else e.loss for e in _evaluations(kind, curve, rung)]
    present = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return math.fsum(present) / len(present) if present and len(present) == len(losses) else None


def rung_batches(kind: RungValue, curve: Sequence[Evaluation], rung: int) -> tuple[float, ...]:
    """``rung_value`` of each validation batch; empty where the batches are not known."""
    evaluations = _evaluations(kind, curve, rung)
    batches = [e.average_batches if kind == "ema" else e.batches for e in evaluations]
    if not batches or len({len(losses) for losses in batches}) > 1:
        return ()
    return tuple(math.fsum(losses) / len(losses) for losses in zip(*batches, strict=True))


def is_compared(kind: RungValue, step: int, *, rung: int) -> bool:
    """Whether an evaluation at ``step`` enters the value at ``rung``."""
    return step == rung or (kind == "mean" and rung / 2 < step < rung)


def _evaluations(kind: RungValue, curve: Sequence[Evaluation], rung: int) -> list[Evaluation]:
    """The evaluations that enter the value, in order of steps; none unless the rung has one."""
    entering = {e.step: e for e in curve if is_compared(kind, e.step, rung=rung)}
    return [entering[step] for step in sorted(entering)] if rung in entering else []


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
