"""Evidence for a choice: rank correlation, regret, and ties by bootstrap."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lag_megatron.selection.ranking import Losses, lag_rule

CONFIDENCE = 0.95
RESAMPLES = 5000
BOOTSTRAP_SEED = 0


def spearman(first: Losses, second: Losses) -> float | None:
    """Rank correlation over the candidates that have both losses, equal losses sharing a rank.

    ``None`` for fewer than three candidates or where all losses of one side are equal.
    """
    from scipy.stats import rankdata

    pairs = _pairs(first, second)
    return _correlation(rankdata(pairs[0]), rankdata(pairs[1]))


def pearson(first: Losses, second: Losses) -> float | None:
    """Linear correlation over the candidates that have both losses; ``None`` as in spearman."""
    return _correlation(*_pairs(first, second))


def regret(early: Losses, late: Losses) -> float | None:
    """Late loss of the candidate that is best early, minus the lowest late loss, in nats.

    ``L(G_t*) - L_min`` of Karp et al. 2024, over candidates that have both losses; ``None`` if
    there are none.
    """
    early, late = _both(early, late)
    best = lag_rule(early)
    return None if best is None else late[best] - min(late.values())


def relative_regret(early: Losses, late: Losses) -> float | None:
    """Regret as a share of the late spread: ``(L(G_t*) - L_min) / (L_max - L_min)``, 0 to 1.

    0 where all late losses are equal (Karp et al. 2024).
    """
    absolute = regret(early, late)
    if absolute is None:
        return None
    _, shared = _both(early, late)
    spread = max(shared.values()) - min(shared.values())
    return absolute / spread if spread > 0 else 0.0


def tied_candidates(batches: Mapping[str, Sequence[float]], *, winner: str) -> list[str]:
    """Candidates whose loss does not differ significantly from the winner's.

    A candidate ties when the 95 % percentile-bootstrap interval of its mean loss difference to
    the winner, paired over validation batches, holds 0.  The seed is fixed: equal losses give
    equal answers.  With a single validation batch every candidate ties.
    """
    return [
        id_
        for id_, losses in batches.items()
        if id_ != winner and _holds_zero(paired_interval(losses, batches[winner]))
    ]


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile-bootstrap interval of the mean of ``first - second``, in their unit.

    Paired: both hold the losses of the same validation batches in the same order, and batches are
    what is drawn.  The seed is fixed.  None for fewer than two batches, which bound nothing.
    """
    from scipy.stats import bootstrap

    assert len(first) == len(second), f"{len(first)} batches against {len(second)}"
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if differences.size < 2:
        return None
    if np.ptp(differences) == 0:  # nothing to draw from: scipy would say NaN, with a warning
        return float(differences[0]), float(differences[0])
    interval = bootstrap(
        (differences,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _holds_zero(interval: tuple[float, float] | None) -> bool:
    return interval is None or interval[0] <= 0 <= interval[1]


def _both(first: Losses, second: Losses) -> tuple[dict[str, float], dict[str, float]]:
    """The two tables over the candidates with a finite loss in both, in the first one's order."""
    pairs = {
        id_: (a, b)
        for id_, a in first.items()
        if a is not None and (b := second.get(id_)) is not None and np.isfinite([a, b]).all()
    }
    return {id_: a for id_, (a, _) in pairs.items()}, {id_: b for id_, (_, b) in pairs.items()}


def _pairs(first: Losses, second: Losses) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = _both(first, second)
    return np.array(list(a.values()), dtype=np.float64), np.array(
        list(b.values()), dtype=np.float64
    )


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
