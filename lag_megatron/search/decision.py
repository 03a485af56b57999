"""From what all probes gave to the decision, and to the metrics that the winner leaves the run."""

from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.engine.training_context import TrainingContext
from lag_megatron.planning.cost import steps_flops, tokens_per_step, validation_flops_per_token
from lag_megatron.planning.random_paths import with_path_length
from lag_megatron.run.directory import RunDirectory
from lag_megatron.run.metrics import MetricRow
from lag_megatron.search.candidates import CandidateState, CandidateTable
from lag_megatron.search.event import GrowthEvent
from lag_megatron.selection import ProbeCost, ProbeRecord, Verdict, build_decision, replay


def search_decision(
    context: TrainingContext,
    event: GrowthEvent,
    table: CandidateTable,
    *,
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
        cost=_cost(context, event, table, coordinator_seconds),
    )


def drop_losers(run: RunDirectory, growth: int, *, winner: Path) -> None:
    """Delete all saved states of a decided event but the winner's."""
    for state in run.growth(growth).glob("*/step*"):
        if state != winner and state.is_dir():
            manifest.remove(state)


def metrics_of(
    context: TrainingContext, event: GrowthEvent, winner: CandidateState
) -> list[MetricRow]:
    """What the winner's steps measured, as lines of the run's metrics."""
    last = event.base_step + winner.reached
    rows: list[MetricRow] = [row for row in winner.dir.training() if row["step"] <= last]
    for point in winner.evaluations:
        if 0 < point.step <= winner.reached:
            step = event.base_step + point.step
            rows.append(context.validation_row(step, stage=event.number, loss=point.loss))
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
    context: TrainingContext, event: GrowthEvent, table: CandidateTable, coordinator_seconds: float
) -> ProbeCost:
    candidates = table.candidates
    steps = sum(candidate.steps for candidate in candidates)
    config = context.config
    trained = sum(_training_flops(context, event, candidate) for candidate in candidates)
    shape = {"num_layers": event.target_layers, "vocab_size": context.vocab_size}
    evaluations = sum(len(candidate.curve) for candidate in candidates)
    if event.growth.compared_by == "ema":  # right after growth the average is the weights
        evaluations += sum(max(len(candidate.curve) - 1, 0) for candidate in candidates)
    validated = evaluations * context.feed.validation_tokens
    return ProbeCost(
        probe_steps=steps,
        tokens=steps * tokens_per_step(config),
        flops=trained + validated * validation_flops_per_token(config, **shape),
        seconds=sum(candidate.seconds for candidate in candidates),
        coordinator_seconds=coordinator_seconds,
    )


def _training_flops(context: TrainingContext, event: GrowthEvent, candidate: CandidateState) -> int:
    """Of a candidate's steps, whose paths may be its own."""
    config = with_path_length(context.config, event.number, event.pool[candidate.index].path_length)
    steps = range(event.base_step, event.base_step + candidate.steps)
    return steps_flops(config, steps, vocab_size=context.vocab_size)
