"""The slope of a training curve, measured while training: when to grow (Staged Training).

Shen et al. 2022, arXiv 2203.06211, section 4: a stage ends where d log loss / d log compute, past
its minimum, has risen above a threshold tau.  ``scaling_law`` has the same for a law.
"""

import math
from collections.abc import Sequence

import numpy as np

from lag_megatron.errors import ConfigError, RunError

LossPoint = tuple[float, float]


def slopes(points: Sequence[LossPoint], window: int) -> list[float]:
    """Least-squares slopes of log loss over log compute, each on ``window`` points in a row.

    Args:
        points: (compute, loss) in the order of training.  Any unit of compute gives the same
            slopes, but its zero matters: count it from where a model of this size would have
            started from scratch, for a grown one from its position in its own schedule.  Points at
            compute 0 are left out; of several at one compute, the last counts.
        window: 2 or more.  Independent noise of standard deviation s in the log loss moves a slope
            by s / sqrt(sum (x - mean x)^2), x being the window's log computes.

    Returns:
        One slope for each point from the ``window``-th on; none where there are fewer points.

    Raises:
        ConfigError: ``window`` is too small.
        RunError: a loss or a compute has no logarithm, or compute falls.
    """
    if window < 2:
        raise ConfigError(f"slope window {window}: a slope needs 2 points or more.")
    kept = _distinct(points)
    if len(kept) < window:
        return []
    x, y = (
        np.lib.stride_tricks.sliding_window_view(column, window)
        for column in np.log(np.array(kept, dtype=np.float64)).T
    )
    centred = x - x.mean(axis=1, keepdims=True)
    found = (centred * y).sum(axis=1) / (centred**2).sum(axis=1)
    return [float(slope) for slope in found]


def has_flattened(points: Sequence[LossPoint], *, tau: float, window: int) -> bool:
    """Whether the latest slope is above ``tau`` after one that was not.

    The flat start of a warm-up does not count: the curve must have been steep before.

    Raises:
        ConfigError: ``tau`` is not below 0, or ``window`` is too small.
        RunError: see :func:`slopes`.
    """
    if not -math.inf < tau < 0:
        raise ConfigError(f"slope threshold {tau}: expected a number below 0, e.g. -0.0575.")
    found = slopes(points, window)
    return bool(found) and found[-1] > tau and min(found) <= tau


def _distinct(points: Sequence[LossPoint]) -> list[LossPoint]:
    """The points at rising compute above 0."""
    kept: list[LossPoint] = []
    for compute, loss in points:
        if not (0 <= compute < math.inf and 0 < loss < math.inf):
            raise RunError(
                f"slope: compute {compute}, loss {loss}: both must be finite, and the loss above "
                f"0. Has the training diverged?"
            )
        if kept and compute < kept[-1][0]:
            raise RunError(
                f"slope: compute falls from {kept[-1][0]:.6g} to {compute:.6g}. The points must be "
                f"in the order of training."
            )
        if kept and compute == kept[-1][0]:
            kept.pop()
        if compute > 0:
            kept.append((compute, loss))
    return kept
