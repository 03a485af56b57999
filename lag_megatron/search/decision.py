"""The decision of an event from its candidates, and the winner's steps as metrics of the run."""

from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.run.directory import RunDirectory
from lag_megatron.run.metrics import MetricRow, validation_row
from lag_megatron.search.candidates import CandidateState, CandidateTable
from lag_megatron.search.event import GrowthEvent
from lag_megatron.search.step_costs import StepCosts
from lag_megatron.selection import ProbeCost, ProbeRecord, Verdict, build_decision, replay


def search_decision(
    event: GrowthEvent,
    table: CandidateTable,
    *,
    costs: StepCosts | None,
    coordinator_seconds: float,
) -> dict[str, Any]:
    """The content of ``decision.json``.

    Raises:
        RunError: when every candidate failed.
    """
    return build_decision(
        {candidate.id: _record_of(candidate) for candidate in table.candidates},
        pool=[candidate.id for candidate in event.pool],
        growth=event.number,
        settings=event.growth,
        verdicts=_verdicts(event, table),
        base_val_loss=event.base_val_loss,
        cost=_cost(event, table, costs, coordinator_seconds),
    )


def drop_losers(run: RunDirectory, growth: int, *, winner: Path) -> None:
    """Delete all saved states of a decided event but the winner's."""
    for state in run.growth(growth).glob("*/step*"):
        if state != winner and state.is_dir():
            manifest.remove_checkpoint(state)


def winner_metrics(
    event: GrowthEvent, winner: CandidateState, *, tokens_per_step: int | None
) -> list[MetricRow]:
    """What the winner's steps measured, as lines of the run's metrics; none without tokens."""
    if tokens_per_step is None:
        return []
    last = event.base_step + winner.reached
    rows: list[MetricRow] = [row for row in winner.dir.training() if row["step"] <= last]
    for point in winner.evaluations:
        if 0 < point.step <= winner.reached:
            step = event.base_step + point.step
            tokens = step * tokens_per_step
            rows.append(validation_row(step, tokens=tokens, stage=event.number, loss=point.loss))
    return sorted(rows, key=lambda row: (row["step"], "val/loss" in row))


def _record_of(candidate: CandidateState) -> ProbeRecord:
    return ProbeRecord(
        status="finished" if candidate.status == "alive" else candidate.status,
        reason=candidate.reason,
        steps=candidate.steps,
        curve=candidate.evaluations,
    )


def _verdicts(event: GrowthEvent, table: CandidateTable) -> tuple[Verdict, ...]:
    if not event.growth.exhaustive:
        return tuple(table.verdicts)
    if not table.alive:
        return ()
    curves = {candidate.id: candidate.evaluations for candidate in table.candidates}
    return replay(event.growth, curves, pool=list(curves)).verdicts


def _cost(
    event: GrowthEvent, table: CandidateTable, costs: StepCosts | None, coordinator_seconds: float
) -> ProbeCost:
    states = table.candidates
    steps = sum(state.steps for state in states)
    evaluations = sum(len(state.curve) for state in states)
    if event.growth.compared_by == "ema":  # right after growth the average is the weights
        evaluations += sum(max(len(state.curve) - 1, 0) for state in states)
    tokens = flops = None
    if costs is not None:
        tokens = steps * costs.tokens_per_step
        flops = evaluations * costs.evaluation_flops + sum(
            costs.training_flops(event.pool[state.index], state.steps) for state in states
        )
    return ProbeCost(
        probe_steps=steps,
        tokens=tokens,
        flops=flops,
        seconds=sum(state.seconds for state in states),
        coordinator_seconds=coordinator_seconds,
    )
