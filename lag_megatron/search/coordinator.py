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

from lag_megatron.engine.training_context import TrainingContext
from lag_megatron.run.directory import write_json
from lag_megatron.run.journal import Journal
from lag_megatron.run.metrics import MetricRow
from lag_megatron.search.candidates import CandidateState, CandidateTable
from lag_megatron.search.decision import drop_losers, metrics_of, search_decision
from lag_megatron.search.event import Assignment, GrowthEvent, ProbeResult
from lag_megatron.selection import can_still_win, judge, rung_value

_POLL_SECONDS = 0.5
OnResult = Callable[[CandidateState, ProbeResult, int], object]


class Coordinator:
    """Replays, hands out and records the probes of one event.

    Args:
        on_result: called after each result with the candidate, the result and the group.
    """

    def __init__(
        self, context: TrainingContext, journal: Journal, event: GrowthEvent, on_result: OnResult
    ) -> None:
        self._context, self._journal, self._event, self._on_result = (
            context,
            journal,
            event,
            on_result,
        )
        self._table = CandidateTable(context.run, journal, event)
        self._changed = threading.Condition()
        self._busy = 0.0
        self.on_stop: Callable[[str], object] = lambda reason: None
        self._stop = ""
        self._winner_needs_state = ""
        self._loaded: dict[int, int | None] = {}  # by group
        # It takes a second to come, which no group need wait for at the first rung.
        threading.Thread(target=importlib.import_module, args=("scipy.stats",)).start()

    def begin(self) -> None:
        """Announce the event, once, and tidy up what a kill left half done."""
        event, growth = self._event, self._event.growth
        folder = self._context.run.growth(event.number)
        folder.mkdir(exist_ok=True)
        write_json(folder / "pool.json", [c.describe() for c in event.pool])
        if self._journal.find("growth_started", growth=event.number) is None:
            self._journal.append(
                "growth_started",
                growth=event.number,
                stage=event.number,
                step=event.base_step,
                base=self._context.run.relative(event.base),
                base_val_loss=event.base_val_loss,
                source_layers=event.source_layers,
                target_layers=event.target_layers,
                rule=growth.rule,
                lag=growth.lag,
                rungs=list(event.rungs),
                pool=[c.id for c in event.pool],
            )
        self._table.stop_losers()
        for candidate in self._table.alive:
            if reason := candidate.dir.failure():
                self._table.failed(candidate, reason)
        if not self._over:
            self._drop_states()

    def ask(
        self, group: int, loaded_candidate: int | None, *, stopped: Callable[[], str]
    ) -> Assignment:
        """The next assignment of a group; waits while all work is being done by others.

        Args:
            group: who asks.
            loaded_candidate: index of the candidate whose state the group has in memory.
            stopped: looked at while waiting: why this process is to end, or nothing.
        """
        with self._exclusive():
            while True:
                if self._stop and not self._over:  # an end that all groups see alike
                    return Assignment(stop=self._stop)
                assignment = self._next_assignment(group, loaded_candidate)
                if assignment is not None:
                    return assignment
                waiting = time.perf_counter()
                self._changed.wait(_POLL_SECONDS)
                self._busy -= time.perf_counter() - waiting
                if reason := stopped():
                    self._end(reason)

    def needs_checkpoint(self, result: ProbeResult) -> bool:
        """Whether the state of a candidate that has just come to a rung can be needed."""
        with self._exclusive():
            growth, rung, alive = self._event.growth, result.rung, self._table.alive
            mine = self._table.candidates[result.candidate]
            if growth.exhaustive or mine.id == self._winner_needs_state:
                return True
            mine.add_curve(result.evaluations)
            values = {
                candidate.id: rung_value(growth.compared_by, candidate.evaluations, rung)
                for candidate in alive
                if candidate.reached >= rung or candidate is mine
            }
            pool = [candidate.id for candidate in alive]
            return can_still_win(growth, rung, values, mine.id, pool=pool, alive=len(alive))

    def record(self, group: int, result: ProbeResult) -> None:
        """Write down how far a candidate has come, and delete the states that it beat."""
        with self._exclusive():
            candidate = self._table.add_result(result, group=group)
            if not result.failure and result.rung == self._event.decides_at:
                self._table.finished(candidate)
                self._drop_states()
            self._on_result(candidate, result, group)

    def stop(self, reason: str) -> None:
        """Every group saves what it has and ends."""
        with self._exclusive():
            self._end(reason)

    def decide(self) -> tuple[dict[str, Any], list[MetricRow]]:
        """Write ``decision.json``; also the metrics of the winner's steps, which are the run's.

        Raises:
            RunError: when every candidate failed.
        """
        decision = search_decision(
            self._context, self._event, self._table, coordinator_seconds=self._busy
        )
        write_json(self._context.run.growth(self._event.number) / "decision.json", decision)
        winner = self._table.by_id(decision["chosen"])
        return decision, metrics_of(self._context, self._event, winner)

    def announce(self, decision: dict[str, Any]) -> Path:
        """Journal the decision, after which it stands; returns the winner's state."""
        winner = self._table.by_id(decision["chosen"])
        assert winner.saved_state is not None, f"{winner.id} has won, but its state was not kept"
        state = self._context.run.relative(winner.saved_state)
        number = self._event.number
        if self._journal.find("decision", growth=number) is None:
            length = self._event.pool[winner.index].path_length
            paths = {} if length is None else {"path_length": length}
            self._journal.append("decision", growth=number, chosen=winner.id, state=state, **paths)
        if not self._event.growth.exhaustive:
            drop_losers(self._context.run, number, winner=winner.saved_state)
        return winner.saved_state

    def _end(self, reason: str) -> None:
        if not self._stop:
            self._stop = reason
            self.on_stop(reason)

    # Handing out

    def _next_assignment(self, group: int, loaded_candidate: int | None) -> Assignment | None:
        """None while there is nothing to do but wait for other groups."""
        while not self._over:
            rung = self._rung
            waiting = [c for c in self._table.alive if c.reached < rung]
            free = [c for c in waiting if c.group is None]
            if free:
                candidate = self._choice(free, group, loaded_candidate)
                self._table.started(candidate, group=group, rung=rung)
                return Assignment(
                    candidate.index, rung, max(candidate.reached, 0), candidate.attempts
                )
            if waiting:
                return None
            self._finish_rung(rung)
        return Assignment()

    def _choice(
        self, free: list[CandidateState], group: int, loaded_candidate: int | None
    ) -> CandidateState:
        """What the group has loaded; else what nobody does; else the first."""
        self._loaded[group] = loaded_candidate
        elsewhere = set(self._loaded.values()) - {loaded_candidate}
        mine = [candidate for candidate in free if candidate.index == loaded_candidate]
        others = [candidate for candidate in free if candidate.index not in elsewhere]
        candidate = (mine or others or free)[0]
        self._loaded[group] = candidate.index
        return candidate

    def _finish_rung(self, rung: int) -> None:
        """All that are left have come to the rung: who goes on?"""
        alive = self._table.alive
        self._winner_needs_state = ""
        if self._event.growth.exhaustive:
            for candidate in alive:
                if not candidate.has_saved_state:
                    candidate.reached = -1  # deleted since; it is trained again
            return
        if self._decided and self._winner not in alive:
            self._table.retract()
        if not self._decided:
            curves = {c.id: c.evaluations for c in self._table.candidates}
            ids = [candidate.id for candidate in alive]
            self._table.decided(judge(self._event.growth, rung, curves, alive=ids))
        if self._decided:
            winner = self._winner
            if not winner.has_saved_state:  # lost with a group that died, or deleted
                winner.reached, self._winner_needs_state = -1, winner.id
                return
            for candidate in alive:
                self._table.finished(candidate)
        self._drop_states()

    @property
    def _winner(self) -> CandidateState:
        return self._table.by_id(self._table.verdicts[-1].goes_on[0])

    @property
    def _decided(self) -> bool:
        verdicts = self._table.verdicts
        return bool(verdicts) and verdicts[-1].decided

    @property
    def _rung(self) -> int:
        """The rung that candidates are being brought to."""
        if self._decided:
            return self._table.verdicts[-1].rung
        return self._event.rungs[len(self._table.verdicts)]

    @property
    def _over(self) -> bool:
        """Whether nothing is left to train."""
        alive = self._table.alive
        if not alive:
            return True
        if self._event.growth.exhaustive:
            return all(c.reached >= self._rung and c.has_saved_state for c in alive)
        return (
            self._decided
            and all(c.reached >= self._rung for c in alive)
            and self._winner in alive
            and self._winner.has_saved_state
        )

    def _order(self, candidate: CandidateState) -> tuple[float, int]:
        """By value at the deciding rung; earlier in the pool wins ties."""
        growth, rung = self._event.growth, self._event.decides_at
        assert rung is not None
        value = rung_value(growth.compared_by, candidate.evaluations, rung)
        return (float("inf") if value is None else value, candidate.index)

    def _drop_states(self) -> None:
        """Delete what cannot win any more."""
        event = self._event
        if event.growth.exhaustive:
            return
        at_end = [c for c in self._table.alive if c.reached == event.decides_at]
        # A winner that was trained again stays it, whatever rounding did to its loss.
        best = self._winner if self._decided else min(at_end, key=self._order, default=None)
        for candidate in self._table.candidates:
            lost = candidate.status in ("stopped", "failed") or (
                candidate in at_end and candidate is not best
            )
            if lost and candidate.group is None:
                candidate.dir.keep_only(None)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One question at a time; the time that answers take is part of the search's cost."""
        with self._changed:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._busy += time.perf_counter() - started
                self._changed.notify_all()
