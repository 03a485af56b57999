"""The order in which a mixture's sources are sampled: shares by weight, for any length of run."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# Weights that need a finer grid are rounded to it: each share is off by less than one in 65536.
_FINEST = 1 << 16


class Blend:
    """An endless order of sources in which no share is ever off by a whole sample.

    Among the first n samples source i has more than ``n * share[i] - 1`` and fewer than
    ``n * share[i] + 1``, for every n.  Megatron's ``build_blending_indices`` takes the source that
    is furthest behind, which lets shares drift further (1.12 samples for weights 57, 17, 17, 9) and
    needs memory for the whole run.  Here each source's k-th sample has the window of places in
    which it may stand, and among the open windows the one that closes first is served (R. Tijdeman,
    "The chairman assignment problem", Discrete Mathematics 32, 1980).  All shares are exact at the
    end of a period, so the order of one period, repeated, is the whole order.

    Args:
        weights: of the sources, above 0; only their ratios matter.

    Attributes:
        counts: samples of each source in a period, whose length is their sum.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = np.asarray(_whole(weights), dtype=np.int64)
        self._period = int(self.counts.sum())
        order = _order(self.counts.tolist(), self._period)
        self._source = np.asarray(order, dtype=np.int16)
        self._before = np.zeros(self._period, dtype=np.int64)
        for source in range(len(self.counts)):
            places = np.flatnonzero(self._source == source)
            self._before[places] = np.arange(len(places))

    @property
    def shares(self) -> list[float]:
        """The weights, made to sum to 1."""
        return [float(share) for share in self.counts / self._period]

    def place(self, sample: int) -> tuple[int, int]:
        """The source of a sample of the run, and how many samples of it came before."""
        turn, place = divmod(sample, self._period)
        source = int(self._source[place])
        return source, turn * int(self.counts[source]) + int(self._before[place])

    def drawn(self, samples: int) -> list[int]:
        """How many of the first ``samples`` of the run come from each source."""
        turns, rest = divmod(samples, self._period)
        part = np.bincount(self._source[:rest], minlength=len(self.counts))
        return [int(count) for count in turns * self.counts + part]

    def longest(self, available: Sequence[int], *, at_most: int) -> int:
        """The most samples that take from no source more than it has available."""
        low, high = 0, at_most
        while low < high:
            middle = (low + high + 1) // 2
            fits = all(
                drawn <= limit for drawn, limit in zip(self.drawn(middle), available, strict=True)
            )
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights as they are written, or the nearest on the grid."""
    exact = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(value.denominator for value in exact))
    counts = [int(value * unit) for value in exact]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= _FINEST:
        return counts
    # Largest remainders; no source is rounded away.
    shares = [Fraction(count * _FINEST, total) for count in counts]
    rounded = [max(1, math.floor(share)) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: rounded[i] - shares[i])
    for source in by_rest[: max(0, _FINEST - sum(rounded))]:
        rounded[source] += 1
    return rounded


def _order(counts: Sequence[int], period: int) -> list[int]:
    """The sources of one period, by earliest deadline.

    Sample k of source i (from 0) may stand at places p with ``floor(k * period / counts[i]) <= p <
    ceil((k + 1) * period / counts[i])``.
    """
    opening = [(0, source, 0) for source in range(len(counts))]
    waiting: list[tuple[int, int, int]] = []
    order = []
    for place in range(period):
        while opening and opening[0][0] <= place:
            _, source, number = heapq.heappop(opening)
            deadline = -(-(number + 1) * period // counts[source])
            heapq.heappush(waiting, (deadline, source, number))
        _, source, number = heapq.heappop(waiting)
        order.append(source)
        if number + 1 < counts[source]:
            opens = (number + 1) * period // counts[source]
            heapq.heappush(opening, (opens, source, number + 1))
    return order
