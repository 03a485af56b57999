"""Means over seeds with their intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """A mean of ``count`` values; ``low`` and ``high`` are None where one value gives no interval.

    The interval is Student's, at :data:`CONFIDENCE`: mean plus or minus t s / sqrt(n), with
    n - 1 degrees of freedom.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def holds_zero(self) -> bool | None:
        """Whether the interval holds 0; None without one."""
        if self.low is None or self.high is None:
            return None
        return self.low <= 0 <= self.high


def mean_interval(values: Sequence[float]) -> MeanInterval | None:
    """The mean of independent values and its interval; None for no values."""
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return MeanInterval(mean, None, None, count)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    half = t * statistics.stdev(values) / math.sqrt(count)
    return MeanInterval(mean, mean - half, mean + half, count)


def paired_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float]
) -> MeanInterval | None:
    """The mean difference ``ours - theirs`` over the keys, such as seeds, that both have.

    Runs of one seed read the same text in the same order, so that what it does to the loss
    cancels out.
    """
    return mean_interval([ours[key] - theirs[key] for key in ours if key in theirs])
