"""What is known of each candidate of an event: the replay of the journal and their files."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.run.directory import RunDirectory
from lag_megatron.run.journal import Journal
from lag_megatron.search.candidate_dir import CandidateFolder
from lag_megatron.search.event import Event, Progress
from lag_megatron.selection import Evaluation, Verdict


@dataclass(slots=True)
class Entry:
    """One candidate.

    Attributes:
        reached: the last rung that it has finished; -1 before the first.
        steps: optimizer steps taken since growth.
        state: the newest saved state that the journal knows.
        group: the probe group that is at work on it.
    """

    index: int
    id: str
    folder: CandidateFolder
    status: Literal["alive", "finished", "stopped", "failed"] = "alive"
    reason: str = ""
    reached: int = -1
    steps: int = 0
    attempts: int = 0
    seconds: float = 0.0
    state: Path | None = None
    group: int | None = None
    curve: dict[int, Evaluation] = field(default_factory=dict)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The curve in order of steps."""
        return tuple(self.curve[step] for step in sorted(self.curve))

    def take_in(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines of a curve."""
        self.curve |= {row["step"]: Evaluation.of_row(row) for row in rows}

    @property
    def has_state(self) -> bool:
        """Whether the state at the last finished rung can be gone on from."""
        return self.state is not None and manifest.is_committed(self.state)


class Ledger:
    """All candidates in the order of the pool, and the verdicts so far."""

    def __init__(self, run: RunDirectory, journal: Journal, event: Event) -> None:
        self._journal, self._event = journal, event
        self.entries = [
            Entry(index, candidate.id, _folder(run, event, candidate.id))
            for index, candidate in enumerate(event.pool)
        ]
        self.verdicts: list[Verdict] = []
        for line in journal.events:
            if line.get("growth") == event.number:
                self._replay(line)
        for entry in self.entries:
            entry.take_in(entry.folder.curve())
            if entry.reached not in entry.curve:
                entry.reached = -1  # its files are gone: it is begun again

    @property
    def alive(self) -> list[Entry]:
        """Those that have neither lost nor been stopped."""
        return [entry for entry in self.entries if entry.status in ("alive", "finished")]

    def entry(self, id_: str) -> Entry:
        """The candidate of that name."""
        return next(entry for entry in self.entries if entry.id == id_)

    def started(self, entry: Entry, *, group: int, rung: int) -> None:
        """A group begins to train a candidate."""
        entry.group = group
        entry.attempts += 1
        self._write("probe_started", entry, rung=rung, group=group)

    def progressed(self, progress: Progress, *, group: int) -> Entry:
        """A group has brought a candidate to a rung, or it has failed on the way."""
        entry = self.entries[progress.candidate]
        entry.group = None
        entry.steps = progress.steps
        entry.seconds += progress.seconds
        for row in progress.evaluations:
            last = row["step"] == progress.rung and not progress.failure
            if row["step"] > entry.reached and not last:
                self._write("probe_eval", entry, step=row["step"], val_loss=row["val_loss"])
        entry.take_in(progress.evaluations)
        if progress.failure:
            self.failed(entry, progress.failure, seconds=progress.seconds)
            return entry
        entry.reached = progress.rung
        entry.state = entry.folder.path / progress.state if progress.state else None
        self._write(
            "probe_eval",
            entry,
            step=progress.rung,
            val_loss=entry.curve[progress.rung].loss,
            rung=progress.rung,
            state=progress.state,
            seconds=progress.seconds,
            group=group,
        )
        return entry

    def failed(self, entry: Entry, reason: str, *, seconds: float = 0.0) -> None:
        """A candidate has lost."""
        entry.status, entry.reason = "failed", reason
        self._write("probe_failed", entry, step=entry.steps, reason=reason, seconds=seconds)

    def finished(self, entry: Entry) -> None:
        """A candidate has come to the last rung."""
        if entry.status == "alive":
            entry.status = "finished"
            self._write(
                "probe_finished",
                entry,
                step=entry.reached,
                val_loss=entry.curve[entry.reached].loss,
                seconds=entry.seconds,
                state=entry.state.name if entry.state else None,
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
                entry = self.entry(id_)
                if entry.status == "alive":
                    entry.status, entry.reason = "stopped", reason
                    self._write("probe_stopped", entry, step=entry.reached, reason=reason)

    def _write(self, event: str, entry: Entry, **fields: Any) -> None:
        self._journal.append(event, growth=self._event.number, id=entry.id, **fields)

    def _replay(self, line: dict[str, Any]) -> None:
        event = line["event"]
        if event == "rung_decided":
            fields = ("rung", "stopped", "decided", "rank_correlation", "transition")
            verdict = Verdict(goes_on=tuple(line["goes_on"]), **{key: line[key] for key in fields})
            if self.verdicts and self.verdicts[-1].rung == verdict.rung:
                self.retract()
            self.verdicts.append(verdict)
            return
        for entry in self.entries:
            if entry.id == line.get("id"):
                _take_in(entry, line)


def _take_in(entry: Entry, line: dict[str, Any]) -> None:
    event = line["event"]
    if event == "probe_started":
        entry.attempts += 1
    elif event == "probe_eval" and "rung" in line:
        entry.reached = entry.steps = line["rung"]
        entry.seconds += line["seconds"]
        entry.state = entry.folder.path / line["state"] if line["state"] else None
    elif event == "probe_failed":
        entry.status, entry.reason, entry.steps = "failed", line["reason"], line["step"]
        entry.seconds += line["seconds"]
    elif event == "probe_stopped":
        entry.status, entry.reason = "stopped", line["reason"]
    elif event == "probe_finished":
        entry.status = "finished"


def _folder(run: RunDirectory, event: Event, id_: str) -> CandidateFolder:
    return CandidateFolder(run.probe(event.number, id_), event.base_step)
