"""When the ranking becomes stable: the phase transition of Karp et al. 2024, figure 4."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lag_megatron.selection.curve import Curves

# The decision is made at this multiple of the transition or later.  The paper leaves between 2
# (UL2: transition near 1000, lag 2000) and 4 (BERT: near 50, lag 200).
MARGIN = 2.0
# A transition at t counts when the ranking stays stable until this multiple of t, ...
EVIDENCE = 1.5
# ... at no fewer evaluations than these, t included.
MIN_EVALUATIONS = 3
# The share of pairs of evaluations that may correlate less: one in four.
OUTLIERS = 0.25
ROUNDING = 1e-9  # a correlation of 1 may be computed as slightly less


def self_correlation(curves: Curves, steps: Sequence[int]) -> list[list[float | None]]:
    """Spearman correlation, over candidates, of the losses at each pair of steps after growth.

    The heat map of Karp et al. 2024, symmetric.  A pair is over the candidates that have finite
    losses at both steps, and None where these are fewer than three or all equal.
    """
    losses = _table(curves, steps)
    finite = np.isfinite(losses)
    if finite.all():
        heat = _heat(losses)
    else:
        heat = np.full((len(steps), len(steps)), math.nan)
        for a, b in zip(*np.triu_indices(len(steps)), strict=True):
            shared = finite[a] & finite[b]
            heat[a, b] = heat[b, a] = _heat(losses[[a, b]][:, shared])[0, 1]
    return [[None if math.isnan(value) else float(value) for value in row] for row in heat]


def phase_transition(curves: Curves, *, threshold: float, until: int) -> int | None:
    """The first evaluated step from which on the ranking lasts until step ``until``, or None.

    Candidates count that have a finite loss at every evaluation up to there.  The ranking lasts
    from t on when the block [t, until] of the heat map is high:

    * three quarters of its pairs of steps correlate at least by ``threshold``.  Not all: a single
      noisy evaluation would hide the transition from every block that holds it;
    * so does the typical (median) pair of t with the others, and that of the last evaluation.
      Without this a step just before the transition hides among many after it, and a transition
      that has just started among many before it;
    * there is evidence: three evaluations or more, the last at 1.5 t or later;
    * it is another ranking than that right after growth, if step 0 was evaluated: the median
      correlation of step 0 with the block is below half the threshold (half, because step 0 is a
      single evaluation with its own noise).  The order in which candidates leave growth lasts for
      a while too, and is the one that misleads.  Where it never changes, no transition is seen,
      which costs steps but no quality.
    """
    seen = {id_: [e for e in curve if e.step <= until] for id_, curve in curves.items()}
    reached = max((e.step for curve in seen.values() for e in curve), default=0)
    whole = {
        id_: curve
        for id_, curve in seen.items()
        if any(e.step == reached for e in curve) and all(math.isfinite(e.loss) for e in curve)
    }
    if not whole:
        return None
    steps = sorted(set.intersection(*({e.step for e in curve} for curve in whole.values())))
    # A correlation that does not exist is no sign of a lasting ranking: NaN fails any comparison.
    heat = _heat(_table(whole, steps))
    enough = threshold - ROUNDING
    for start, step in enumerate(steps[: 1 - MIN_EVALUATIONS]):
        if step <= 0 or reached < EVIDENCE * step or not _lasts(heat[start:, start:], enough):
            continue
        if steps[0] != 0 or not np.median(heat[0, start:]) >= threshold / 2:
            return step
    return None


def _lasts(block: NDArray[np.float64], enough: float) -> bool:
    pairs = block[np.triu_indices_from(block, k=1)]
    return bool(
        np.quantile(pairs, OUTLIERS, method="lower") >= enough
        and np.median(block[0, 1:]) >= enough
        and np.median(block[-1, :-1]) >= enough
    )


def _table(curves: Curves, steps: Sequence[int]) -> NDArray[np.float64]:
    """Losses, a row a step and a column a candidate; NaN where there is none."""
    columns = [{e.step: e.loss for e in curve} for curve in curves.values()]
    table = [[losses.get(step, math.nan) for losses in columns] for step in steps]
    return np.array(table, dtype=np.float64).reshape(len(steps), len(columns))


def _heat(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman correlation of each pair of rows, equal losses sharing a rank; NaN where undefined.

    As ``evidence.spearman``, for all pairs at once: a grid of 200 evaluations has 20 000.
    """
    from scipy.stats import rankdata

    if losses.shape[1] < 3:
        return np.full((len(losses), len(losses)), math.nan)
    ranks = rankdata(losses, axis=1)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    defined = norms > 0
    unit = centred / np.where(defined, norms, 1)[:, None]
    return np.where(np.outer(defined, defined), np.clip(unit @ unit.T, -1, 1), math.nan)
