"""The selection rules: which candidates continue after a rung, and when the event is decided."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lag_megatron.config import GrowthConfig
from lag_megatron.config.schema.run import GUARD_SHARE
from lag_megatron.selection.curve import Curves, rung_value
from lag_megatron.selection.evidence import spearman
from lag_megatron.selection.ranking import Losses, rank
from lag_megatron.selection.transition import MARGIN, ROUNDING, phase_transition

# A ranking with this correlation is stable where ``min_rank_correlation`` is switched off.
LASTING = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome of a rule at one rung.

    Attributes:
        rung: the step after growth that all candidates left have reached.
        goes_on: the candidates that continue, best first; when ``decided``, the whole ranking,
            the first of which is chosen.
        stopped: candidate -> reason, for those that end here.
        decided: there is no further rung.
        rank_correlation: Spearman, over the candidates at the rung, of their ranking shortly
            before (at 0.8 of the rung) and there; None where it was not evaluated there, where
            fewer than three are left or all are equal.
        transition: the phase transition as seen so far, a step after growth.
    """

    rung: int
    goes_on: tuple[str, ...]
    stopped: dict[str, str]
    decided: bool
    rank_correlation: float | None
    transition: int | None

    def describe(self) -> dict[str, Any]:
        """The rung as ``decision.json`` shows it."""
        return {
            "rung": self.rung,
            "rank_correlation": self.rank_correlation,
            "transition": self.transition,
            "goes_on": list(self.goes_on),
            "stopped": list(self.stopped),
        }


def judge(growth: GrowthConfig, rung: int, curves: Curves, *, alive: Sequence[str]) -> Verdict:
    """Apply the rule of ``growth`` after ``rung``; evaluations after it are ignored.

    Halving stops all but the best ``1 / eta``, rounded up, where the guard finds the ranking
    stable.  Where the correlation is undefined (two candidates, a rung of 2 steps or fewer, equal
    losses) no candidate is stopped.  For two candidates this costs one of
    them its remaining steps, and the last comparison is the one that the event is for.  A
    ``min_rank_correlation`` of -1 switches the guard off.

    With the lag ``auto`` the event is decided at twice the phase transition or later, and no
    candidate is stopped before the transition is known.

    Args:
        growth: the settings.
        rung: one of ``growth.rung_steps()``.
        curves: of all candidates of the pool, those that stopped or failed as far as they went:
            they too are evidence of the phase transition.
        alive: candidates that reached the rung with a finite value, in the order of the pool,
            which settles equal values.
    """
    values = {id_: rung_value(growth.compared_by, curves[id_], rung) for id_ in alive}
    assert alive, "a rung without candidates"
    assert None not in values.values(), f"no value at rung {rung}: {values}"
    ranking = rank(values)
    correlation = _rank_correlation(growth, rung, curves, values)
    transition = _transition(growth, rung, curves)
    known = growth.lag != "auto" or transition is not None
    decided = rung >= growth.last_rung or (
        growth.lag == "auto" and transition is not None and rung >= MARGIN * transition
    )
    going = ranking
    if known and not decided and _may_stop(growth, correlation):
        going = ranking[: _places(growth, len(ranking))]
    return Verdict(
        rung=rung,
        goes_on=tuple(going),
        stopped=_reasons(values, ranking, rung=rung, going=len(going)),
        decided=decided,
        rank_correlation=correlation,
        transition=transition,
    )


def can_still_win(
    growth: GrowthConfig, rung: int, values: Losses, id_: str, *, pool: Sequence[str], alive: int
) -> bool:
    """Whether a candidate that has just reached ``rung`` may have to go on from there.

    Once False it stays False, whatever the others' values will be, so its state need not be kept.
    This is about the rule: ``growth.exhaustive`` goes on with the others too.

    Args:
        growth: the settings.
        rung: one of ``growth.rung_steps()``.
        values: finite values at the rung of the candidates that reached it so far, ``id_`` too.
        id_: the candidate.
        pool: all candidates; their order settles equal values.
        alive: how many candidates reach the rung unless they fail on the way to it.
    """
    place = rank({other: values[other] for other in pool if other in values}).index(id_)
    if rung >= growth.last_rung:
        return place == 0
    if growth.lag == "auto" or growth.rule != "halving" or has_guard(growth):
        return True  # the number that continues is known only when all have arrived
    return place < _places(growth, alive)


def planned_rungs(growth: GrowthConfig, *, candidates: int) -> list[tuple[int, int]]:
    """Each rung and how many candidates train to it, if the guard always finds the ranking stable.

    With the lag ``auto`` this is the most that the event can cost: all candidates train to the last
    rung.
    """
    plan, left = [], candidates
    for rung in growth.rung_steps():
        plan.append((rung, left))
        if growth.rule == "halving" and growth.lag != "auto":
            left = _places(growth, left)
    return plan


def guard_step(rung: int) -> int:
    """The step after growth whose ranking the guard compares with that at ``rung``."""
    return round(GUARD_SHARE * rung)


def has_guard(growth: GrowthConfig) -> bool:
    """Whether halving checks that the ranking is stable before it stops candidates."""
    return growth.rank_bar > -1


def _places(growth: GrowthConfig, candidates: int) -> int:
    return -(-candidates // growth.eta)


def _may_stop(growth: GrowthConfig, correlation: float | None) -> bool:
    if growth.rule != "halving":
        return False
    if not has_guard(growth):
        return True
    return correlation is not None and correlation >= growth.rank_bar - ROUNDING


def _rank_correlation(
    growth: GrowthConfig, rung: int, curves: Curves, values: Losses
) -> float | None:
    before = guard_step(rung)
    if before == rung:  # so short a rung has no earlier evaluation to compare with
        return None
    earlier = {id_: rung_value(growth.compared_by, curves[id_], before) for id_ in values}
    if None in earlier.values():
        earlier = {id_: rung_value("last", curves[id_], before) for id_ in values}
    return spearman(earlier, values)


def _transition(growth: GrowthConfig, rung: int, curves: Curves) -> int | None:
    """The transition as seen at the rung.

    Under halving the first one seen stays: later rungs lack the candidates that were stopped, and
    those left differ too little to show a transition.
    """
    threshold = growth.rank_bar if has_guard(growth) else LASTING
    looks = (rung,) if growth.rule == "lag" else growth.rung_steps()
    for look in looks:
        if look <= rung:
            seen = phase_transition(curves, threshold=threshold, until=look)
            if seen is not None:
                return seen
    return None


def _reasons(values: Losses, ranking: Sequence[str], *, rung: int, going: int) -> dict[str, str]:
    bar = values[ranking[going - 1]]
    return {
        id_: f"{_ordinal(place)} of {len(ranking)} at step {rung}: {values[id_]:.4f} against "
        f"{bar:.4f} of the last that went on"
        for place, id_ in enumerate(ranking[going:], start=going + 1)
    }


def _ordinal(number: int) -> str:
    teens = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
