"""The decision of a growth event, as ``decision.json`` holds it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lag_megatron.errors import RunError
from lag_megatron.selection.evidence import ties
from lag_megatron.selection.ranking import RULES, losses_at


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRecord:
    """What a candidate's probe gave.

    Attributes:
        status: ``failed`` for a candidate that diverged, ran out of memory or of time.
        reason: why it failed; empty otherwise.
        steps: optimizer steps taken after growth.
        curve: ``(step, validation loss)``, step counted from growth, 0 included.
        batches: losses of the single validation batches at the last evaluation.
    """

    status: Literal["finished", "failed"]
    reason: str = ""
    steps: int = 0
    curve: tuple[tuple[int, float], ...] = ()
    batches: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeCost:
    """What all probes of an event took together, failed ones and the winner's included."""

    probe_steps: int
    tokens: int
    flops: float
    seconds: float


def build_decision(
    records: Mapping[str, ProbeRecord],
    *,
    pool: Sequence[str],
    growth: int,
    rule: str,
    lag: int,
    base_val_loss: float,
    cost: ProbeCost,
) -> dict[str, Any]:
    """Choose among the candidates and say on what evidence; the result is ``decision.json``.

    Candidates stand in the order of ``pool``, which also settles equal losses.  One whose losses
    are not all finite, or that has none at the lag, has failed whatever its record says.

    Raises:
        RunError: when no candidate is left, with every reason.
    """
    probed = {id_: _checked(records.get(id_), lag=lag) for id_ in pool}
    alive = {id_: record for id_, record in probed.items() if record.status == "finished"}
    curves = {id_: record.curve for id_, record in alive.items()}
    chosen = RULES[rule](losses_at(curves, step=lag))
    if chosen is None:
        raise RunError(_nobody_left(probed, growth=growth))
    batches = {id_: record.batches for id_, record in alive.items() if record.batches}
    return {
        "growth": growth,
        "rule": rule,
        "lag": lag,
        "chosen": chosen,
        "base_val_loss": base_val_loss,
        "candidates": [
            {
                "id": id_,
                "status": record.status,
                "reason": record.reason,
                "steps": record.steps,
                "curve": [[step, loss] for step, loss in record.curve],
            }
            for id_, record in probed.items()
        ],
        "cost": {**asdict(cost), "exhaustive_steps": len(pool) * lag},
        "phase_transition": None,
        "ties": ties(batches, winner=chosen) if chosen in batches else [],
    }


def _checked(record: ProbeRecord | None, *, lag: int) -> ProbeRecord:
    """The record with its losses believed rather than its status; the curve is finite."""
    if record is None:
        return ProbeRecord(status="failed", reason="was not probed")
    bad = [(step, loss) for step, loss in record.curve if not math.isfinite(loss)]
    finite = tuple(point for point in record.curve if math.isfinite(point[1]))
    record = replace(record, curve=finite)
    if record.status == "failed":
        return replace(record, reason=record.reason or "no reason given")
    if bad:
        step, loss = bad[0]
        return replace(record, status="failed", reason=f"validation loss {loss} at step {step}")
    if lag not in dict(finite):
        return replace(record, status="failed", reason=f"no validation loss at step {lag}")
    return record


def _nobody_left(probed: Mapping[str, ProbeRecord], *, growth: int) -> str:
    reasons = "\n".join(f"  {id_}: {record.reason}" for id_, record in probed.items())
    return (
        f"growth {growth}: none of the {len(probed)} candidates is left, so nothing can go on.\n"
        f"{reasons}\n"
        "If they diverged, lower optimizer.lr or raise growth.max_loss; if they ran out of "
        "memory, lower parallel.micro_batch."
    )
