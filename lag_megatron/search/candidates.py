"""How far each candidate of an event has come, read from the journal and the candidates' files."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.run.directory import RunDirectory
from lag_megatron.run.journal import Journal
from lag_megatron.search.candidate_dir import CandidateDir
from lag_megatron.search.event import GrowthEvent, ProbeResult
from lag_megatron.selection import Evaluation, Verdict


@dataclass(slots=True)
class CandidateState:
    """How far one candidate has come.

    Attributes:
        index: in the pool.
        reached: the last rung that it has finished; -1 before the first.
        steps: optimizer steps taken since growth.
        attempts: how often a group has started to train it.
        seconds: wall time of its probes.
        saved_state: the newest saved state in the journal.
        group: the probe group that trains it now.
        curve: evaluations by steps after growth.
    """

    index: int
    id: str
    dir: CandidateDir
    status: Literal["alive", "finished", "stopped", "failed"] = "alive"
    reason: str = ""
    reached: int = -1
    steps: int = 0
    attempts: int = 0
    seconds: float = 0.0
    saved_state: Path | None = None
    group: int | None = None
    curve: dict[int, Evaluation] = field(default_factory=dict)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The curve in order of steps."""
        return tuple(self.curve[step] for step in sorted(self.curve))

    def add_curve(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines of a curve."""
        self.curve |= {row["step"]: Evaluation.of_row(row) for row in rows}

    @property
    def has_saved_state(self) -> bool:
        """Whether training can go on from the state at the last finished rung."""
        return self.saved_state is not None and manifest.is_committed(self.saved_state)


class CandidateTable:
    """All candidates in the order of the pool, and the verdicts so far.

    Args:
        run: directory of the run.
        journal: what it says of the event is replayed.
        event: whose candidates these are.
        at_work: whether a group still trains what the journal says it was assigned last; by
            default all groups began anew.
    """

    def __init__(
        self,
        run: RunDirectory,
        journal: Journal,
        event: GrowthEvent,
        *,
        at_work: Callable[[int], bool] = lambda group: False,
    ) -> None:
        self._journal, self._event = journal, event
        self.candidates = [
            CandidateState(index, candidate.id, _candidate_dir(run, event, candidate.id))
            for index, candidate in enumerate(event.pool)
        ]
        self.verdicts: list[Verdict] = []
        for line in journal.events:
            if line.get("growth") == event.number:
                self._replay(line)
        for candidate in self.candidates:
            if candidate.group is not None and not at_work(candidate.group):
                candidate.group = None
            candidate.add_curve(candidate.dir.curve())
            if candidate.reached not in candidate.curve:
                candidate.reached = -1  # its files are gone: it starts again

    @property
    def alive(self) -> list[CandidateState]:
        """Candidates that have neither failed nor been stopped."""
        return [
            candidate for candidate in self.candidates if candidate.status in ("alive", "finished")
        ]

    @property
    def decided(self) -> bool:
        """Whether the last verdict names the winner."""
        return bool(self.verdicts) and self.verdicts[-1].decided

    @property
    def winner(self) -> CandidateState:
        """The first candidate that the last verdict lets go on."""
        return self.by_id(self.verdicts[-1].goes_on[0])

    def by_id(self, id_: str) -> CandidateState:
        """The candidate with that id."""
        return next(candidate for candidate in self.candidates if candidate.id == id_)

    def start(self, candidate: CandidateState, *, group: int, rung: int) -> None:
        """Note that a group begins to train a candidate."""
        candidate.group = group
        candidate.attempts += 1
        self._write("probe_started", candidate, rung=rung, group=group)

    def add_result(self, result: ProbeResult, *, group: int) -> CandidateState:
        """Note that a group has trained a candidate to a rung, or that it failed on the way."""
        candidate = self.candidates[result.candidate]
        candidate.group = None
        candidate.steps = result.steps
        candidate.seconds += result.seconds
        for row in result.evaluations:
            last = row["step"] == result.rung and not result.failure
            if row["step"] > candidate.reached and not last:
                self._write("probe_eval", candidate, step=row["step"], val_loss=row["val_loss"])
        candidate.add_curve(result.evaluations)
        if result.failure:
            self.fail(candidate, result.failure, seconds=result.seconds)
            return candidate
        candidate.reached = result.rung
        candidate.saved_state = candidate.dir.path / result.state if result.state else None
        self._write(
            "probe_eval",
            candidate,
            step=result.rung,
            val_loss=candidate.curve[result.rung].loss,
            rung=result.rung,
            state=result.state,
            seconds=result.seconds,
            group=group,
        )
        return candidate

    def fail(self, candidate: CandidateState, reason: str, *, seconds: float = 0.0) -> None:
        """Note that a candidate has lost."""
        candidate.status, candidate.reason = "failed", reason
        self._write("probe_failed", candidate, step=candidate.steps, reason=reason, seconds=seconds)

    def finish(self, candidate: CandidateState) -> None:
        """Note that a candidate has reached the last rung."""
        if candidate.status == "alive":
            candidate.status = "finished"
            self._write(
                "probe_finished",
                candidate,
                step=candidate.reached,
                val_loss=candidate.curve[candidate.reached].loss,
                seconds=candidate.seconds,
                state=candidate.saved_state.name if candidate.saved_state else None,
            )

    def add_verdict(self, verdict: Verdict) -> None:
        """Note what the rule decided at a rung, and stop those that do not go on."""
        self._journal.append(
            "rung_decided",
            growth=self._event.number,
            rung=verdict.rung,
            goes_on=list(verdict.goes_on),
            stopped=verdict.stopped,
            decided=verdict.decided,
            rank_correlation=verdict.rank_correlation,
            transition=verdict.transition,
        )
        self.verdicts.append(verdict)
        self.stop_losers()

    def remove_last_verdict(self) -> None:
        """Remove a verdict whose winner has failed since; the next one replaces it."""
        self.verdicts.pop()

    def stop_losers(self) -> None:
        """Mark the candidates that a verdict has stopped and that are not marked yet."""
        for verdict in self.verdicts:
            for id_, reason in verdict.stopped.items():
                candidate = self.by_id(id_)
                if candidate.status == "alive":
                    candidate.status, candidate.reason = "stopped", reason
                    self._write("probe_stopped", candidate, step=candidate.reached, reason=reason)

    def _write(self, event: str, candidate: CandidateState, **fields: Any) -> None:
        self._journal.append(event, growth=self._event.number, id=candidate.id, **fields)

    def _replay(self, line: dict[str, Any]) -> None:
        event = line["event"]
        if event == "rung_decided":
            fields = ("rung", "stopped", "decided", "rank_correlation", "transition")
            verdict = Verdict(goes_on=tuple(line["goes_on"]), **{key: line[key] for key in fields})
            if self.verdicts and self.verdicts[-1].rung == verdict.rung:
                self.remove_last_verdict()
            self.verdicts.append(verdict)
            return
        for candidate in self.candidates:
            if candidate.id == line.get("id"):
                _apply(candidate, line)


def _apply(candidate: CandidateState, line: dict[str, Any]) -> None:
    event = line["event"]
    if event == "probe_started":
        candidate.attempts += 1
        candidate.group = line["group"]
    elif event == "probe_eval" and "rung" in line:
        candidate.group = None
        candidate.reached = candidate.steps = line["rung"]
        candidate.seconds += line["seconds"]
        candidate.saved_state = candidate.dir.path / line["state"] if line["state"] else None
    elif event == "probe_failed":
        candidate.group = None
        candidate.status, candidate.reason, candidate.steps = "failed", line["reason"], line["step"]
        candidate.seconds += line["seconds"]
    elif event == "probe_stopped":
        candidate.status, candidate.reason = "stopped", line["reason"]
    elif event == "probe_finished":
        candidate.status = "finished"


def _candidate_dir(run: RunDirectory, event: GrowthEvent, id_: str) -> CandidateDir:
    return CandidateDir(run.probe(event.number, id_), event.base_step)
