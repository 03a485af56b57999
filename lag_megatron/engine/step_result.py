"""What one optimizer step measured, and an evaluation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepResult:
    """Measured over the whole global batch.

    Attributes:
        loss: mean cross-entropy in nats per label.
        grad_norm: L2 norm of the gradient before clipping; None where DeepSpeed computes none.
        stop_asked: whether some rank was asked to stop, the same on all.
    """

    loss: float
    grad_norm: float | None
    stop_asked: bool


def mean(values: Sequence[float]) -> float:
    """Mean of per-batch losses; batches are equally large."""
    return math.fsum(values) / len(values)
