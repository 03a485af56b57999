"""Ranking candidates by validation loss, and the rules that choose one."""

import math
from collections.abc import Mapping, Sequence

Losses = Mapping[str, float | None]
Curve = Sequence[tuple[int, float]]


def losses_at(curves: Mapping[str, Curve], *, step: int) -> dict[str, float | None]:
    """Each candidate's validation loss, in nats a token, ``step`` optimizer steps after growth.

    ``None`` for a candidate that was not evaluated at that step or whose loss is not finite.
    """
    return {id_: _finite(dict(curve).get(step)) for id_, curve in curves.items()}


def rank(losses: Losses) -> list[str]:
    """Candidates by rising loss; equal losses in the order given, missing ones last."""
    return sorted(losses, key=lambda id_: _order(losses[id_]))


def lag_rule(losses: Losses) -> str | None:
    """LAG@k: the candidate with the lowest loss at step k (Karp et al. 2024, section 3).

    ``None`` when no candidate has a finite loss.
    """
    best = next(iter(rank(losses)), None)
    return best if best is not None and _finite(losses[best]) is not None else None


def least_disturbed(losses: Losses) -> str | None:
    """LAG@0: the candidate with the lowest loss right after growing.

    ``None`` also when several have the same, as after growths that all preserve the function: then
    the losses at step 0 do not rank them.
    """
    present = [loss for loss in losses.values() if _finite(loss) is not None]
    return None if len(present) > 1 and len(set(present)) == 1 else lag_rule(losses)


def _order(loss: float | None) -> float:
    finite = _finite(loss)
    return math.inf if finite is None else finite


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None
