"""The coordinator of a growth event: it hands out probes, drops candidates and decides.

One is on rank 0 and serves all probe groups, one call at a time.  After a kill its state is read
from the journal and the candidates' files, so at most what was being trained is lost.

Two groups, candidates A to D, rungs at steps 4 and 8, and a rule that keeps two at the first rung::

    group 0: ask -> A to 4, record;  ask -> C to 4, record;  ask -> waits for group 1
    group 1: ask -> B to 4, record;  ask -> D to 4, record;  ask -> all are at 4: B and D go on
    group 1: ask -> D to 8, which is in its engine;  record;  ask -> waits for group 0
    group 0: ask -> B to 8, from its saved state;    record;  ask -> all are at 8: B wins
    group 0 and group 1 get an assignment without a candidate: nothing is left to do

A and C lose their saved states when the first rung is decided.  Of B and D, the one with the higher
loss at the last rung is not saved, or loses its state as soon as the other one is better.
"""

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lag_megatron.run.directory import DECISION, RunDirectory, write_json
from lag_megatron.run.journal import Journal
from lag_megatron.run.metrics import MetricRow
from lag_megatron.search.candidates import CandidateState, CandidateTable
from lag_megatron.search.decision import drop_losers, search_decision, winner_metrics
from lag_megatron.search.event import Assignment, GrowthEvent, ProbeResult
from lag_megatron.search.rungs import Rungs
from lag_megatron.search.step_costs import StepCosts

_POLL_SECONDS = 0.5
OnResult = Callable[[CandidateState, ProbeResult, int], object]


class Coordinator:
    """Hands out and records the probes of one event; its methods may be called by many threads.

    Args:
        run: directory of the run.
        journal: of the run; steps of the event that it records already are not repeated.
        event: what is searched.
        costs: of the event's steps and evaluations, for the decision; None if they are not known.
        on_result: called after each result with the candidate, the result and the group.
    """

    def __init__(
        self,
        run: RunDirectory,
        journal: Journal,
        event: GrowthEvent,
        *,
        costs: StepCosts | None,
        on_result: OnResult,
    ) -> None:
        self._run, self._journal, self._event = run, journal, event
        self._costs, self._on_result = costs, on_result
        self._table = CandidateTable(run, journal, event)
        self._rungs = Rungs(event, self._table)
        self._changed = threading.Condition()
        self._busy = 0.0
        self.on_stop: Callable[[str], object] = lambda reason: None
        self._stop = ""
        self._loaded: dict[int, int | None] = {}  # by group
        # The import takes a second, which the first rung's decision need not wait for.
        threading.Thread(target=importlib.import_module, args=("scipy.stats",)).start()

    def begin(self) -> None:
        """Write the event to the journal, once, and finish what a kill interrupted."""
        event, growth = self._event, self._event.growth
        folder = self._run.growth(event.number)
        folder.mkdir(exist_ok=True)
        write_json(folder / "pool.json", [c.describe() for c in event.pool])
        if self._journal.find("growth_started", growth=event.number) is None:
            self._journal.append(
                "growth_started",
                growth=event.number,
                stage=event.number,
                step=event.base_step,
                base=self._run.relative(event.base),
                base_val_loss=event.base_val_loss,
                source_layers=event.source_layers,
                target_layers=event.target_layers,
                rule=growth.rule,
                lag=growth.lag,
                rungs=list(event.rungs),
                pool=[c.id for c in event.pool],
            )
        self._finish_interrupted()

    def refresh(self, journal: Journal, *, at_work: Callable[[int], bool]) -> None:
        """Replay the journal again, to which other processes have written since.

        Args:
            journal: read anew.
            at_work: whether a group still trains what it was assigned last.
        """
        with self._locked():
            self._journal = journal
            self._table = CandidateTable(self._run, journal, self._event, at_work=at_work)
            self._rungs = Rungs(self._event, self._table)
            self._finish_interrupted()

    def candidate(self, index: int) -> CandidateState:
        """What is known of a candidate."""
        return self._table.candidates[index]

    def poll(self, group: int) -> Assignment | None:
        """The next assignment of a group; None while all work is being done by others.

        A group that has not recorded a result since gets the same candidate again.
        """
        with self._locked():
            loaded_candidate = None
            for candidate in self._table.alive:
                if candidate.group == group:
                    candidate.group, loaded_candidate = None, candidate.index
            return self._next_assignment(group, loaded_candidate)

    def ask(
        self, group: int, loaded_candidate: int | None, *, stopped: Callable[[], str]
    ) -> Assignment:
        """The next assignment of a group; waits while all work is being done by others.

        Args:
            group: who asks.
            loaded_candidate: index of the candidate whose state the group has in memory.
            stopped: called while waiting; why the group's process is to end, or empty.
        """
        with self._locked():
            while True:
                if self._stop and not self._rungs.over:  # an end that all groups see alike
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
        """Whether the candidate of a result can still win, so that its state has to be saved."""
        with self._locked():
            return self._rungs.needs_checkpoint(result)

    def record(self, group: int, result: ProbeResult) -> None:
        """Journal a result, and delete the saved states that cannot win any more."""
        with self._locked():
            candidate = self._table.add_result(result, group=group)
            if not result.failure and result.rung == self._event.decides_at:
                self._table.finish(candidate)
                self._rungs.drop_states()
            self._on_result(candidate, result, group)

    def stop(self, reason: str) -> None:
        """Let every group save what it has and end at its next step."""
        with self._locked():
            self._end(reason)

    def decide(self) -> tuple[dict[str, Any], list[MetricRow]]:
        """Write ``decision.json``; also the metrics of the winner's steps, which are the run's.

        Raises:
            RunError: when every candidate failed.
        """
        decision = search_decision(
            self._event, self._table, costs=self._costs, coordinator_seconds=self._busy
        )
        write_json(self._run.growth(self._event.number) / DECISION, decision)
        winner = self._table.by_id(decision["chosen"])
        tokens_per_step = self._costs.tokens_per_step if self._costs else None
        return decision, winner_metrics(self._event, winner, tokens_per_step=tokens_per_step)

    def announce(self, decision: dict[str, Any]) -> Path:
        """Journal the decision, after which it stands; returns the winner's state."""
        winner = self._table.by_id(decision["chosen"])
        assert winner.saved_state is not None, f"{winner.id} has won, but its state was not kept"
        state = self._run.relative(winner.saved_state)
        number = self._event.number
        if self._journal.find("decision", growth=number) is None:
            length = self._event.pool[winner.index].path_length
            paths = {} if length is None else {"path_length": length}
            self._journal.append("decision", growth=number, chosen=winner.id, state=state, **paths)
        if not self._event.growth.exhaustive:
            drop_losers(self._run, number, winner=winner.saved_state)
        return winner.saved_state

    def _finish_interrupted(self) -> None:
        """Finish what a kill interrupted."""
        self._table.stop_losers()
        for candidate in self._table.alive:
            if reason := candidate.dir.failure():
                self._table.fail(candidate, reason)
        if not self._rungs.over:
            self._rungs.drop_states()

    def _end(self, reason: str) -> None:
        if not self._stop:
            self._stop = reason
            self.on_stop(reason)

    # Assignments

    def _next_assignment(self, group: int, loaded_candidate: int | None) -> Assignment | None:
        """None while there is nothing to do but wait for other groups."""
        while not self._rungs.over:
            rung = self._rungs.current
            waiting = [c for c in self._table.alive if c.reached < rung]
            free = [c for c in waiting if c.group is None]
            if free:
                candidate = self._choice(free, group, loaded_candidate)
                self._table.start(candidate, group=group, rung=rung)
                return Assignment(
                    candidate.index, rung, max(candidate.reached, 0), candidate.attempts
                )
            if waiting:
                return None
            self._rungs.finish_current()
        return Assignment()

    def _choice(
        self, free: list[CandidateState], group: int, loaded_candidate: int | None
    ) -> CandidateState:
        """What this group has loaded; else what no group has loaded; else the first."""
        self._loaded[group] = loaded_candidate
        elsewhere = set(self._loaded.values()) - {loaded_candidate}
        mine = [candidate for candidate in free if candidate.index == loaded_candidate]
        others = [candidate for candidate in free if candidate.index not in elsewhere]
        candidate = (mine or others or free)[0]
        self._loaded[group] = candidate.index
        return candidate

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One call at a time; the time that calls take is part of the search's cost."""
        with self._changed:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._busy += time.perf_counter() - started
                self._changed.notify_all()
