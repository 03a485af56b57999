"""The coordinator of a growth event: who trains what next, who goes on, who has won.

It lives on rank 0 and serves all probe groups; a lock makes their questions take turns.  Everything
it knows it can read again from the journal and the candidates' files, so a kill costs at most what
was being trained.
"""

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lag_megatron.engine.training_context import Job, MetricRow
from lag_megatron.run.directory import write_json
from lag_megatron.run.journal import Journal
from lag_megatron.search.candidates import Entry, Ledger
from lag_megatron.search.decision import conclude, drop_losers, metrics_of
from lag_megatron.search.event import Event, Progress, Turn
from lag_megatron.selection import can_still_win, judge, rung_value

_POLL_SECONDS = 0.5
Told = Callable[[Entry, Progress, int], object]


class Coordinator:
    """Replays, hands out and records the probes of one event.

    Args:
        told: called after each progress with the candidate, the progress and the group.
    """

    def __init__(self, job: Job, journal: Journal, event: Event, told: Told) -> None:
        self._job, self._journal, self._event, self._told = job, journal, event, told
        self._ledger = Ledger(job.run, journal, event)
        self._changed = threading.Condition()
        self._busy = 0.0
        self.on_stop: Callable[[str], object] = lambda reason: None
        self._stop = ""
        self._winner_needs_state = ""
        self._held: dict[int, int | None] = {}  # by group
        # It takes a second to come, which no group need wait for at the first rung.
        threading.Thread(target=importlib.import_module, args=("scipy.stats",)).start()

    def begin(self) -> None:
        """Announce the event, once, and tidy up what a kill left half done."""
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
                rungs=list(event.rungs),
                pool=[c.id for c in event.pool],
            )
        self._ledger.stop_losers()
        for entry in self._ledger.alive:
            if reason := entry.folder.failure():
                self._ledger.failed(entry, reason)
        if not self._over:
            self._drop_states()

    def ask(self, group: int, holds: int | None, *, stopped: Callable[[], str]) -> Turn:
        """The next turn of a group; waits while all work is being done by others.

        Args:
            group: who asks.
            holds: the candidate whose state the group has, and so can go on with at once.
            stopped: looked at while waiting: why this process is to end, or nothing.
        """
        with self._attention():
            while True:
                if self._stop and not self._over:  # an end that all groups see alike
                    return Turn(stop=self._stop)
                turn = self._next_turn(group, holds)
                if turn is not None:
                    return turn
                waiting = time.perf_counter()
                self._changed.wait(_POLL_SECONDS)
                self._busy -= time.perf_counter() - waiting
                if reason := stopped():
                    self._end(reason)

    def may_win(self, progress: Progress) -> bool:
        """Whether the state of a candidate that has just come to a rung can be needed."""
        with self._attention():
            growth, rung, alive = self._event.growth, progress.rung, self._ledger.alive
            mine = self._ledger.entries[progress.candidate]
            if growth.exhaustive or mine.id == self._winner_needs_state:
                return True
            mine.take_in(progress.evaluations)
            values = {
                entry.id: rung_value(growth.compared_by, entry.evaluations, rung)
                for entry in alive
                if entry.reached >= rung or entry is mine
            }
            pool = [entry.id for entry in alive]
            return can_still_win(growth, rung, values, mine.id, pool=pool, alive=len(alive))

    def record(self, group: int, progress: Progress) -> None:
        """Write down how far a candidate has come, and delete the states that it beat."""
        with self._attention():
            entry = self._ledger.progressed(progress, group=group)
            if not progress.failure and progress.rung == self._event.decides_at:
                self._ledger.finished(entry)
                self._drop_states()
            self._told(entry, progress, group)

    def stop(self, reason: str) -> None:
        """Every group saves what it has and ends."""
        with self._attention():
            self._end(reason)

    def decide(self) -> tuple[dict[str, Any], list[MetricRow]]:
        """Write ``decision.json``; also the metrics of the winner's steps, which are the run's.

        Raises:
            RunError: when every candidate failed.
        """
        decision = conclude(self._job, self._event, self._ledger, coordinator_seconds=self._busy)
        write_json(self._job.run.growth(self._event.number) / "decision.json", decision)
        winner = self._ledger.entry(decision["chosen"])
        return decision, metrics_of(self._job, self._event, winner)

    def announce(self, decision: dict[str, Any]) -> Path:
        """Journal the decision, after which it stands; returns the winner's state."""
        winner = self._ledger.entry(decision["chosen"])
        assert winner.state is not None, f"{winner.id} has won, but its state was not kept"
        state = self._job.run.relative(winner.state)
        number = self._event.number
        if self._journal.find("decision", growth=number) is None:
            length = self._event.pool[winner.index].path_length
            paths = {} if length is None else {"path_length": length}
            self._journal.append("decision", growth=number, chosen=winner.id, state=state, **paths)
        if not self._event.growth.exhaustive:
            drop_losers(self._job.run, number, winner=winner.state)
        return winner.state

    def _end(self, reason: str) -> None:
        if not self._stop:
            self._stop = reason
            self.on_stop(reason)

    # Handing out

    def _next_turn(self, group: int, holds: int | None) -> Turn | None:
        """None while there is nothing to do but wait for other groups."""
        while not self._over:
            rung = self._rung
            waiting = [e for e in self._ledger.alive if e.reached < rung]
            free = [e for e in waiting if e.group is None]
            if free:
                entry = self._choice(free, group, holds)
                self._ledger.started(entry, group=group, rung=rung)
                return Turn(entry.index, rung, max(entry.reached, 0), entry.attempts)
            if waiting:
                return None
            self._finish_rung(rung)
        return Turn()

    def _choice(self, free: list[Entry], group: int, holds: int | None) -> Entry:
        """What the group holds; else what nobody does; else the first."""
        self._held[group] = holds
        elsewhere = set(self._held.values()) - {holds}
        mine = [entry for entry in free if entry.index == holds]
        others = [entry for entry in free if entry.index not in elsewhere]
        entry = (mine or others or free)[0]
        self._held[group] = entry.index
        return entry

    def _finish_rung(self, rung: int) -> None:
        """All that are left have come to the rung: who goes on?"""
        alive = self._ledger.alive
        self._winner_needs_state = ""
        if self._event.growth.exhaustive:
            for entry in alive:
                if not entry.has_state:
                    entry.reached = -1  # deleted since; it is trained again
            return
        if self._decided and self._winner not in alive:
            self._ledger.retract()
        if not self._decided:
            curves = {e.id: e.evaluations for e in self._ledger.entries}
            ids = [entry.id for entry in alive]
            self._ledger.decided(judge(self._event.growth, rung, curves, alive=ids))
        if self._decided:
            winner = self._winner
            if not winner.has_state:  # lost with a group that died, or deleted
                winner.reached, self._winner_needs_state = -1, winner.id
                return
            for entry in alive:
                self._ledger.finished(entry)
        self._drop_states()

    @property
    def _winner(self) -> Entry:
        return self._ledger.entry(self._ledger.verdicts[-1].goes_on[0])

    @property
    def _decided(self) -> bool:
        verdicts = self._ledger.verdicts
        return bool(verdicts) and verdicts[-1].decided

    @property
    def _rung(self) -> int:
        """The rung that candidates are being brought to."""
        if self._decided:
            return self._ledger.verdicts[-1].rung
        return self._event.rungs[len(self._ledger.verdicts)]

    @property
    def _over(self) -> bool:
        """Whether nothing is left to train."""
        alive = self._ledger.alive
        if not alive:
            return True
        if self._event.growth.exhaustive:
            return all(e.reached >= self._rung and e.has_state for e in alive)
        return (
            self._decided
            and all(e.reached >= self._rung for e in alive)
            and self._winner in alive
            and self._winner.has_state
        )

    def _order(self, entry: Entry) -> tuple[float, int]:
        """By value at the deciding rung; earlier in the pool wins ties."""
        growth, rung = self._event.growth, self._event.decides_at
        assert rung is not None
        value = rung_value(growth.compared_by, entry.evaluations, rung)
        return (float("inf") if value is None else value, entry.index)

    def _drop_states(self) -> None:
        """Delete what cannot win any more."""
        event = self._event
        if event.growth.exhaustive:
            return
        at_end = [e for e in self._ledger.alive if e.reached == event.decides_at]
        # A winner that was trained again stays it, whatever rounding did to its loss.
        best = self._winner if self._decided else min(at_end, key=self._order, default=None)
        for entry in self._ledger.entries:
            lost = entry.status in ("stopped", "failed") or (entry in at_end and entry is not best)
            if lost and entry.group is None:
                entry.folder.keep_only(None)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """One question at a time; the time that answers take is part of the search's cost."""
        with self._changed:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._busy += time.perf_counter() - started
                self._changed.notify_all()
