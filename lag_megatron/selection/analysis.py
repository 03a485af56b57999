"""How well early losses predict final ones: the measures of Karp et al. 2024, arXiv 2406.02469."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lag_megatron.selection.evidence import regret, relative_regret
from lag_megatron.selection.ranking import Curve, lag_rule, least_disturbed, losses_at, rank

RECALL_AT = (1, 2, 3, 4, 5)
MIN_CANDIDATES = 3

FiniteLosses = dict[str, float]


def finished_curves(curves: Mapping[str, Curve]) -> dict[str, dict[int, float]]:
    """The candidates that have a finite loss at the last step that any has one at.

    Each as step after growth to validation loss in nats a token, finite losses only.
    """
    finite = {
        id_: {step: loss for step, loss in curve if math.isfinite(loss)}
        for id_, curve in curves.items()
    }
    final = max((step for curve in finite.values() for step in curve), default=None)
    return {id_: curve for id_, curve in finite.items() if final in curve}


def analyse_curves(
    curves: Mapping[str, Curve],
    *,
    lag: int,
    base_val_loss: float | None,
    chosen: str | None,
    last_block: Sequence[str],
    random_block: Sequence[str],
) -> dict[str, Any]:
    """How well the loss t steps after growth predicts the final one (Karp et al. 2024, section 4).

    The final step is the last that any candidate has a loss at, and only candidates that reached
    it are compared: where the rule stopped some, these are the survivors, and only
    ``growth.exhaustive`` compares all.  The steps are those at which all compared have a loss.
    Fewer than three compared, and everything but ``steps`` and ``base_val_loss`` is None.

    Args:
        curves: step after growth and validation loss in nats a token, of every candidate that has
            not failed; their order settles equal losses.
        lag: step of the rule's decision.
        base_val_loss: validation loss before growth, passed through.
        chosen: the rule's choice; it stands for LAG@k where the lag was not evaluated, and has a
            row ``chosen`` where LAG@k would have chosen otherwise.
        last_block: candidates that copy the last layers to the top, the preferred one first.
        random_block: candidates that put fresh layers on top, the preferred one first.

    Returns:
        ``steps``; for each of them ``pearson`` and ``spearman`` against the final loss, ``regret``
        in nats and ``relative_regret`` of LAG@t, and per k ``recall`` (1 where the oracle is among
        the k best, else 0); ``self_spearman`` for each pair of steps; ``table`` with what each
        policy would have chosen from all candidates: its losses are None where it did not reach the
        final step, the row is None where there is no such candidate or evaluation.
    """
    ended = finished_curves(curves)
    steps = sorted(set.intersection(*map(set, ended.values()))) if ended else []
    choices = {
        **_choices(curves, lag=lag, chosen=chosen),
        "last_block": next(iter(last_block), None),
        "random_block": next(iter(random_block), None),
    }
    if len(ended) < MIN_CANDIDATES:
        return _nothing(steps, ("oracle", *choices), base_val_loss)
    at = [{id_: curve[step] for id_, curve in ended.items()} for step in steps]
    final = at[-1]
    choices = {"oracle": lag_rule(final), **choices}
    table = {policy: _row(id_, final) for policy, id_ in choices.items()}
    known = {"steps": steps, "table": table, "base_val_loss": base_val_loss}
    return {**known, **_correlations(at), **_regrets(at)}


def _nothing(
    steps: Sequence[int], policies: Sequence[str], base_val_loss: float | None
) -> dict[str, Any]:
    per_step = [None] * len(steps)
    return {
        "steps": list(steps),
        "pearson": per_step,
        "spearman": per_step,
        "self_spearman": [per_step] * len(steps),
        "regret": per_step,
        "relative_regret": per_step,
        "recall": {str(k): per_step for k in RECALL_AT},
        "table": dict.fromkeys(policies),
        "base_val_loss": base_val_loss,
    }


def _choices(curves: Mapping[str, Curve], *, lag: int, chosen: str | None) -> dict[str, str | None]:
    """What LAG@k and LAG@0 would have chosen, and the rule where it chose otherwise."""
    by_lag = lag_rule(losses_at(curves, step=lag)) or chosen
    choices = {f"lag@{lag}": by_lag, "lag@0": least_disturbed(losses_at(curves, step=0))}
    return choices if chosen in (None, by_lag) else {**choices, "chosen": chosen}


def _row(id_: str | None, final: FiniteLosses) -> dict[str, Any] | None:
    """What choosing that candidate costs: final loss and regret in nats, and its share."""
    if id_ is None:
        return None
    row: dict[str, Any] = dict.fromkeys(("id", "final_loss", "regret", "relative_regret"))
    if id_ not in final:
        return {**row, "id": id_}
    low, high = min(final.values()), max(final.values())
    above = final[id_] - low
    return {
        "id": id_,
        "final_loss": final[id_],
        "regret": above,
        "relative_regret": above / (high - low) if high > low else 0.0,
    }


def _recall(losses: FiniteLosses, final: FiniteLosses, k: int) -> int:
    """1 if the best candidate in the end is among the ``k`` best now, equal losses in order."""
    return int(lag_rule(final) in rank(losses)[:k])


def _regrets(at: Sequence[FiniteLosses]) -> dict[str, Any]:
    """Against the last table, for each of them."""
    final = at[-1]
    return {
        "regret": [regret(losses, final) for losses in at],
        "relative_regret": [relative_regret(losses, final) for losses in at],
        "recall": {str(k): [_recall(losses, final, k) for losses in at] for k in RECALL_AT},
    }


def _correlations(at: Sequence[FiniteLosses]) -> dict[str, Any]:
    from scipy.stats import rankdata

    losses = np.array([list(table.values()) for table in at], dtype=np.float64)
    by_rank = _correlation_matrix(rankdata(losses, axis=1))
    return {
        "pearson": [row[-1] for row in _correlation_matrix(losses)],
        "spearman": [row[-1] for row in by_rank],
        "self_spearman": by_rank,
    }


def _correlation_matrix(rows: NDArray[np.float64]) -> list[list[float | None]]:
    """Linear correlation of every pair of rows; None where one of the two is constant."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    constant = np.ptp(rows, axis=1) == 0
    norms = np.where(constant, 1.0, np.linalg.norm(centred, axis=1))
    scaled = centred / norms[:, None]
    matrix = np.clip(scaled @ scaled.T, -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    return [
        [None if constant[i] or constant[j] else float(value) for j, value in enumerate(row)]
        for i, row in enumerate(matrix)
    ]
