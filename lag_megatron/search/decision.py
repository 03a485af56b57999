"""From what all probes gave to the decision, and to the metrics that the winner leaves the run."""

from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.engine.training_context import Job, MetricRow
from lag_megatron.planning.cost import steps_flops, tokens_per_step, validation_flops_per_token
from lag_megatron.planning.random_paths import with_path_length
from lag_megatron.run.directory import RunDirectory
from lag_megatron.search.candidates import Entry, Ledger
from lag_megatron.search.event import Event
from lag_megatron.selection import ProbeCost, ProbeRecord, Verdict, build_decision, replay


def conclude(
    job: Job, event: Event, ledger: Ledger, *, coordinator_seconds: float
) -> dict[str, Any]:
    """The content of ``decision.json``.

    Raises:
        RunError: when every candidate failed.
    """
    return build_decision(
        {entry.id: _record_of(entry) for entry in ledger.entries},
        pool=[candidate.id for candidate in event.pool],
        growth=event.number,
        settings=event.growth,
        verdicts=_verdicts(event, ledger),
        base_val_loss=event.base_val_loss,
        cost=_cost(job, event, ledger, coordinator_seconds),
    )


def drop_losers(run: RunDirectory, growth: int, *, winner: Path) -> None:
    """Delete all saved states of a decided event but the winner's."""
    for state in run.growth(growth).glob("*/step*"):
        if state != winner and state.is_dir():
            manifest.remove_checkpoint(state)


def metrics_of(job: Job, event: Event, winner: Entry) -> list[MetricRow]:
    """What the winner's steps measured, as lines of the run's metrics."""
    last = event.base_step + winner.reached
    rows: list[MetricRow] = [row for row in winner.folder.training() if row["step"] <= last]
    for point in winner.evaluations:
        if 0 < point.step <= winner.reached:
            step = event.base_step + point.step
            rows.append(job.validation_row(step, stage=event.number, loss=point.loss))
    return sorted(rows, key=lambda row: (row["step"], "val/loss" in row))


def _record_of(entry: Entry) -> ProbeRecord:
    return ProbeRecord(
        status="finished" if entry.status == "alive" else entry.status,
        reason=entry.reason,
        steps=entry.steps,
        curve=entry.evaluations,
    )


def _verdicts(event: Event, ledger: Ledger) -> tuple[Verdict, ...]:
    if not event.growth.exhaustive:
        return tuple(ledger.verdicts)
    if not ledger.alive:
        return ()
    curves = {entry.id: entry.evaluations for entry in ledger.entries}
    return replay(event.growth, curves, pool=list(curves)).verdicts


def _cost(job: Job, event: Event, ledger: Ledger, coordinator_seconds: float) -> ProbeCost:
    entries = ledger.entries
    steps = sum(entry.steps for entry in entries)
    config = job.config
    trained = sum(_training_flops(job, event, entry) for entry in entries)
    shape = {"num_layers": event.target_layers, "vocab_size": job.vocab_size}
    evaluations = sum(len(entry.curve) for entry in entries)
    if event.growth.compared_by == "ema":  # right after growth the average is the weights
        evaluations += sum(max(len(entry.curve) - 1, 0) for entry in entries)
    validated = evaluations * job.feed.validation_tokens
    return ProbeCost(
        probe_steps=steps,
        tokens=steps * tokens_per_step(config),
        flops=trained + validated * validation_flops_per_token(config, **shape),
        seconds=sum(entry.seconds for entry in entries),
        coordinator_seconds=coordinator_seconds,
    )


def _training_flops(job: Job, event: Event, entry: Entry) -> int:
    """Of a candidate's steps, whose paths may be its own."""
    config = with_path_length(job.config, event.number, event.pool[entry.index].path_length)
    steps = range(event.base_step, event.base_step + entry.steps)
    return steps_flops(config, steps, vocab_size=job.vocab_size)
