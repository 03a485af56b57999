"""What is known of each candidate of an event: the replay of the journal and their files."""

from collections.abc import Iterable
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
    """One candidate.

    Attributes:
        reached: the last rung that it has finished; -1 before the first.
        steps: optimizer steps taken since growth.
        saved_state: the newest state that the journal knows.
        group: the probe group that is at work on it.
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
        """Whether the state at the last finished rung can be gone on from."""
        return self.saved_state is not None and manifest.is_committed(self.saved_state)


class CandidateTable:
    """All candidates in the order of the pool, and the verdicts so far."""

    def __init__(self, run: RunDirectory, journal: Journal, event: GrowthEvent) -> None:
        self._journal, self._event = journal, event
        self.candidates = [
            CandidateState(index, candidate.id, _folder(run, event, candidate.id))
            for index, candidate in enumerate(event.pool)
        ]
        self.verdicts: list[Verdict] = []
        for line in journal.events:
            if line.get("growth") == event.number:
                self._replay(line)
        for candidate in self.candidates:
            candidate.add_curve(candidate.dir.curve())
            if candidate.reached not in candidate.curve:
                candidate.reached = -1  # its files are gone: it is begun again

    @property
    def alive(self) -> list[CandidateState]:
        """Those that have neither lost nor been stopped."""
        return [
            candidate for candidate in self.candidates if candidate.status in ("alive", "finished")
        ]

    def by_id(self, id_: str) -> CandidateState:
        """The candidate of that name."""
        return next(candidate for candidate in self.candidates if candidate.id == id_)

    def started(self, candidate: CandidateState, *, group: int, rung: int) -> None:
        """A group begins to train a candidate."""
        candidate.group = group
        candidate.attempts += 1
        self._write("probe_started", candidate, rung=rung, group=group)

    def add_result(self, result: ProbeResult, *, group: int) -> CandidateState:
        """A group has brought a candidate to a rung, or it has failed on the way."""
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
            self.failed(candidate, result.failure, seconds=result.seconds)
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

    def failed(self, candidate: CandidateState, reason: str, *, seconds: float = 0.0) -> None:
        """A candidate has lost."""
        candidate.status, candidate.reason = "failed", reason
        self._write("probe_failed", candidate, step=candidate.steps, reason=reason, seconds=seconds)

    def finished(self, candidate: CandidateState) -> None:
        """A candidate has come to the last rung."""
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

    def decided(self, verdict: Verdict) -> None:
        """The rule has spoken at a rung."""
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

    def retract(self) -> None:
        """Forget the last verdict, whose winner has failed since; the next one replaces it."""
        self.verdicts.pop()

    def stop_losers(self) -> None:
        """Note everyone that a verdict has stopped and that is not noted yet."""
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
                self.retract()
            self.verdicts.append(verdict)
            return
        for candidate in self.candidates:
            if candidate.id == line.get("id"):
                _apply(candidate, line)


def _apply(candidate: CandidateState, line: dict[str, Any]) -> None:
    event = line["event"]
    if event == "probe_started":
        candidate.attempts += 1
    elif event == "probe_eval" and "rung" in line:
        candidate.reached = candidate.steps = line["rung"]
        candidate.seconds += line["seconds"]
        candidate.saved_state = candidate.dir.path / line["state"] if line["state"] else None
    elif event == "probe_failed":
        candidate.status, candidate.reason, candidate.steps = "failed", line["reason"], line["step"]
        candidate.seconds += line["seconds"]
    elif event == "probe_stopped":
        candidate.status, candidate.reason = "stopped", line["reason"]
    elif event == "probe_finished":
        candidate.status = "finished"


def _folder(run: RunDirectory, event: GrowthEvent, id_: str) -> CandidateDir:
    return CandidateDir(run.probe(event.number, id_), event.base_step)
