"""The decision of a growth event, as ``decision.json`` holds it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from lag_megatron.config import GrowthConfig
from lag_megatron.errors import RunError
from lag_megatron.selection.curve import Evaluation, rung_batches, rung_value
from lag_megatron.selection.evidence import tied_candidates
from lag_megatron.selection.ranking import rank
from lag_megatron.selection.rules import Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRecord:
    """The result of one candidate's probe.

    Attributes:
        status: ``stopped`` for a candidate that the rule did not let go on; ``failed`` for one
            that diverged, ran out of memory or of time.
        reason: why it failed or stopped; empty otherwise.
        steps: optimizer steps taken after growth.
        curve: its evaluations, that at step 0 included.
    """

    status: Literal["finished", "stopped", "failed"]
    reason: str = ""
    steps: int = 0
    curve: tuple[Evaluation, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeCost:
    """What all probes of an event took together, failed ones and the winner's included.

    ``seconds`` is the sum over probes, however many were at work at a time.
    """

    probe_steps: int
    tokens: int
    flops: float
    seconds: float
    coordinator_seconds: float = 0.0


def build_decision(
    records: Mapping[str, ProbeRecord],
    *,
    pool: Sequence[str],
    growth: int,
    settings: GrowthConfig,
    verdicts: Sequence[Verdict],
    base_val_loss: float,
    cost: ProbeCost,
) -> dict[str, Any]:
    """The chosen candidate and the evidence for it, as ``decision.json`` holds them.

    The chosen candidate is the first of the last verdict that has not failed since; where all of
    those have, which takes an exhaustive run, the best of the others at that rung.  A candidate
    whose losses are not all finite, or that finished without a value at the deciding rung, has
    failed whatever its record says.  Candidates stand in the order of ``pool``.

    Args:
        records: what was measured; a candidate of the pool without one was not probed.
        pool, growth, settings: all candidates, number of the event, and its rule.
        verdicts: one for each rung, the last one decided; fewer only when no candidate is left.
        base_val_loss, cost: in nats per token before growth, and of all probes.

    Raises:
        RunError: when no candidate is left, with every reason.
    """
    reasons = dict(item for verdict in verdicts for item in verdict.stopped.items())
    lag = verdicts[-1].rung if verdicts else settings.last_rung
    check = partial(_checked, settings=settings, lag=lag)
    probed = {id_: check(records.get(id_), stopped=reasons.get(id_, "")) for id_ in pool}
    finished = {id_: record for id_, record in probed.items() if record.status == "finished"}
    if not finished:
        raise RunError(_no_candidate_left(probed, growth=growth))
    undecided = not verdicts or not verdicts[-1].decided
    assert not undecided, f"growth {growth}: step {lag} did not decide between {list(finished)}"
    ranking = [id_ for id_ in verdicts[-1].goes_on if id_ in finished]
    chosen = ranking[0] if ranking else _best(finished, settings, lag)
    return {
        "growth": growth,
        "rule": settings.rule,
        "lag": lag,
        "chosen": chosen,
        "base_val_loss": base_val_loss,
        "candidates": [_candidate(id_, record) for id_, record in probed.items()],
        "cost": {**asdict(cost), "exhaustive_steps": len(pool) * lag},
        "phase_transition": verdicts[-1].transition,
        "ties": _ties(finished, ranking, settings, lag),
        "rung_value": settings.compared_by,
        "rungs": [verdict.describe() for verdict in verdicts],
    }


def _candidate(id_: str, record: ProbeRecord) -> dict[str, Any]:
    return {
        "id": id_,
        "status": record.status,
        "reason": record.reason,
        "steps": record.steps,
        "curve": [[evaluation.step, evaluation.loss] for evaluation in record.curve],
    }


def _best(finished: Mapping[str, ProbeRecord], settings: GrowthConfig, lag: int) -> str:
    values = {id_: rung_value(settings.compared_by, r.curve, lag) for id_, r in finished.items()}
    return rank(values)[0]


def _ties(
    finished: Mapping[str, ProbeRecord], ranking: Sequence[str], settings: GrowthConfig, lag: int
) -> list[str]:
    """Candidates whose value at the lag does not differ significantly from the first one's."""
    batches = {
        id_: losses
        for id_, record in finished.items()
        if id_ in ranking and (losses := rung_batches(settings.compared_by, record.curve, lag))
    }
    return tied_candidates(batches, winner=ranking[0]) if ranking and ranking[0] in batches else []


def _checked(
    record: ProbeRecord | None, *, settings: GrowthConfig, lag: int, stopped: str
) -> ProbeRecord:
    """The record with the status that follows from its losses; its curve is finite."""
    if record is None:
        return ProbeRecord(status="failed", reason="was not probed")
    bad = [e for e in record.curve if not math.isfinite(e.loss)]
    record = replace(record, curve=tuple(e for e in record.curve if math.isfinite(e.loss)))
    if record.status == "failed":
        return replace(record, reason=record.reason or "no reason given")
    if bad:
        reason = f"validation loss {bad[0].loss} at step {bad[0].step}"
        return replace(record, status="failed", reason=reason)
    if record.status == "stopped":
        return replace(record, reason=record.reason or stopped or "no reason given")
    if rung_value(settings.compared_by, record.curve, lag) is None:
        return replace(record, status="failed", reason=f"no validation loss at step {lag}")
    return record


def _no_candidate_left(probed: Mapping[str, ProbeRecord], *, growth: int) -> str:
    reasons = "\n".join(f"  {id_}: {record.reason}" for id_, record in probed.items())
    return (
        f"growth {growth}: none of the {len(probed)} candidates is left, so nothing can go on.\n"
        f"{reasons}\n"
        "If they diverged, lower optimizer.lr or raise growth.max_loss; if they ran out of "
        "memory, lower parallel.micro_batch."
    )
