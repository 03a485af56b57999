"""The coordinator's knowledge of a growth event: what is done, what is next, who won.

It runs on rank 0.  Everything it knows it can read again from the journal and the candidates'
files, so a kill costs at most the probe that was running.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint import commit
from lag_megatron.files import flush_to_disk
from lag_megatron.probe.journal import Journal
from lag_megatron.probe.probe import CURVE, TRAINING, Event, ProbeResult
from lag_megatron.probe.steps import Job, MetricRow
from lag_megatron.rundir import write_json
from lag_megatron.schedule import (
    tokens_per_step,
    training_flops_per_token,
    validation_flops_per_token,
)
from lag_megatron.selection import ProbeCost, ProbeRecord, build_decision
from lag_megatron.tracking import read_rows


@dataclass(frozen=True, slots=True)
class Turn:
    """What all ranks do next: probe candidate ``index``, or, for None, decide."""

    index: int | None
    to_beat: float


class Coordinator:
    """Replays, hands out and records the probes of one event."""

    def __init__(self, job: Job, journal: Journal, event: Event) -> None:
        self._job, self._journal, self._event = job, journal, event

    def begin(self) -> None:
        """Announce the event, once."""
        event, growth = self._event, self._event.growth
        folder = self._job.run.growth(event.number)
        folder.mkdir(exist_ok=True)
        write_json(folder / "pool.json", [c.describe() for c in event.pool])
        if self._journal.find("growth_started", growth=event.number) is None:
            self._journal.append(
                "growth_started",
                growth=event.number,
                stage=event.number,
                step=event.base_step,
                base=self._job.run.relative(event.base),
                base_val_loss=event.base_val_loss,
                source_layers=event.source_layers,
                target_layers=event.target_layers,
                rule=growth.rule,
                lag=growth.lag,
                pool=[c.id for c in event.pool],
            )
        self._drop_states(keep=self._best()[1])

    def next_turn(self) -> Turn:
        """The first candidate without a result, or the decision."""
        best, _ = self._best()
        for index, candidate in enumerate(self._event.pool):
            if self._ending(candidate.id) is None:
                self._journal.append("probe_started", growth=self._event.number, id=candidate.id)
                return Turn(index, best)
        return Turn(None, best)

    def record(self, index: int, result: ProbeResult) -> None:
        """Write down how a probe ended, and delete the state that it beat."""
        event, run = self._event, self._job.run
        candidate = event.pool[index].id
        known = {"growth": event.number, "id": candidate, "step": result.steps}
        folder = run.probe(event.number, candidate)
        for path in (folder / CURVE, folder / TRAINING, folder):
            if path.exists():
                flush_to_disk(path)  # the journal must not know more than the disk
        for row in read_rows(folder / CURVE):
            self._journal.append(
                "probe_eval", **{**known, "step": row["step"]}, val_loss=row["val_loss"]
            )
        if result.failure:
            self._journal.append(
                "probe_failed", **known, reason=result.failure, seconds=result.seconds
            )
            return
        self._journal.append(
            "probe_finished",
            **known,
            val_loss=result.val_loss,
            seconds=result.seconds,
            state=run.relative(result.state) if result.state else None,
        )
        self._drop_states(keep=self._best()[1])

    def decide(self) -> tuple[dict[str, Any], list[MetricRow]]:
        """Write ``decision.json``; also the metrics of the winner's steps, which are the run's.

        Raises:
            RunError: when every candidate failed.
        """
        event, run = self._event, self._job.run
        decision = build_decision(
            {c.id: self._record_of(c.id) for c in event.pool},
            pool=[c.id for c in event.pool],
            growth=event.number,
            rule=event.growth.rule,
            lag=event.growth.lag,
            base_val_loss=event.base_val_loss,
            cost=self._cost(),
        )
        write_json(run.growth(event.number) / "decision.json", decision)
        folder = run.probe(event.number, decision["chosen"])
        rows: list[MetricRow] = list(read_rows(folder / TRAINING))
        for row in read_rows(folder / CURVE):
            if row["step"]:
                step = event.base_step + row["step"]
                rows.append(
                    self._job.validation_row(step, stage=event.number, loss=row["val_loss"])
                )
        return decision, sorted(rows, key=lambda row: (row["step"], "val/loss" in row))

    def announce(self, decision: dict[str, Any]) -> Path:
        """Journal the decision, after which it stands; returns the winner's state."""
        event = self._event
        state = self._ending(decision["chosen"])["state"]  # type: ignore[index]
        assert state is not None, f"{decision['chosen']} leads, but its state was not kept"
        if self._journal.find("decision", growth=event.number) is None:
            self._journal.append(
                "decision", growth=event.number, chosen=decision["chosen"], state=state
            )
        return self._job.run.root / state

    def _ending(self, candidate: str) -> dict[str, Any] | None:
        for event in ("probe_finished", "probe_failed"):
            entry = self._journal.find(event, growth=self._event.number, id=candidate)
            if entry is not None:
                return entry
        return None

    def _best(self) -> tuple[float, Path | None]:
        """Lowest loss at the lag so far and its state; earlier candidates win ties."""
        best, state = math.inf, None
        for candidate in self._event.pool:
            entry = self._ending(candidate.id)
            if entry and entry["event"] == "probe_finished" and entry["val_loss"] < best:
                best, state = entry["val_loss"], self._job.run.root / entry["state"]
        return best, state

    def _drop_states(self, *, keep: Path | None) -> None:
        for candidate in self._event.pool:
            for state in self._job.run.probe(self._event.number, candidate.id).glob("step*"):
                if state != keep and state.is_dir():
                    commit.remove(state)

    def _record_of(self, candidate: str) -> ProbeRecord:
        entry = self._ending(candidate)
        assert entry is not None, candidate
        rows = read_rows(self._job.run.probe(self._event.number, candidate) / CURVE)
        return ProbeRecord(
            status="failed" if entry["event"] == "probe_failed" else "finished",
            reason=entry.get("reason", ""),
            steps=entry["step"],
            curve=tuple((row["step"], row["val_loss"]) for row in rows),
            batches=tuple(rows[-1]["val_loss_batches"]) if rows else (),
        )

    def _cost(self) -> ProbeCost:
        entries = [e for c in self._event.pool if (e := self._ending(c.id)) is not None]
        steps = sum(entry["step"] for entry in entries)
        tokens = steps * tokens_per_step(self._job.config)
        shape = {"num_layers": self._event.target_layers, "vocab_size": self._job.vocab_size}
        model = self._job.config.model
        curves = [self._record_of(c.id).curve for c in self._event.pool]
        validated = sum(map(len, curves)) * self._job.feed.validation_tokens
        flops = tokens * training_flops_per_token(model, **shape)
        flops += validated * validation_flops_per_token(model, **shape)
        return ProbeCost(
            probe_steps=steps,
            tokens=tokens,
            flops=flops,
            seconds=sum(entry["seconds"] for entry in entries),
        )
