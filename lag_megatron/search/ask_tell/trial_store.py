"""Rank 0's side of a search by ask and tell: trials are handed out and recorded."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import RunError
from lag_megatron.run.journal import Journal
from lag_megatron.search.ask_tell.reported_losses import ReportedLosses
from lag_megatron.search.ask_tell.saved_state import commit_state, saved_files
from lag_megatron.search.ask_tell.search_directory import SearchDirectory
from lag_megatron.search.ask_tell.trial import Trial, Winner
from lag_megatron.search.candidate_dir import CURVE, TRAINING
from lag_megatron.search.candidates import CandidateState
from lag_megatron.search.coordinator import Coordinator
from lag_megatron.search.event import Assignment, GrowthEvent, ProbeResult
from lag_megatron.search.step_costs import StepCosts


class TrialStore:
    """The trials of one search on disk; its methods may be called by many threads.

    Args:
        directory: of the search, which other processes may use at the same time.
        event: what is searched.
        costs: of the event's steps and evaluations; None if they are not known.
    """

    def __init__(
        self, directory: SearchDirectory, event: GrowthEvent, costs: StepCosts | None
    ) -> None:
        self.directory, self._event, self._costs = directory, event, costs
        self._mutex = threading.Lock()
        self._asked: dict[int, float] = {}  # by worker, when its trial was handed out

    def open(self) -> Winner | None:
        """Begin the search or check that it is the one that is there; its winner, if decided.

        Raises:
            RunError: if the directory holds another search.
        """
        event, run = self._event, self.directory.run
        settings = {k: v for k, v in asdict(event.growth).items() if k != "pool"}
        with self.directory.locked():
            self.directory.claim(
                {
                    "base": str(event.base),
                    "base_step": event.base_step,
                    "base_val_loss": event.base_val_loss,
                    "growth": settings,
                    "pool": {candidate.id: candidate.plan.digest for candidate in event.pool},
                }
            )
            journal = Journal(run.journal)
            self._coordinator = Coordinator(
                run, journal, event, costs=self._costs, on_result=lambda *unused: None
            )
            if journal.find("growth_started", growth=event.number) is None:
                self._coordinator.begin()
            return self._decided(journal)

    def poll(self, worker: int) -> Trial | Winner | None:
        """The worker's trial, or the winner; None while others train all that is left.

        Raises:
            RunError: if no candidate is left, or another process is this worker.
        """
        self.directory.hold_worker(worker)
        with self._replayed() as (coordinator, journal):
            if winner := self._decided(journal):
                return winner
            assignment = coordinator.poll(worker)
            if assignment is None:
                return None
            if assignment.candidate is None:
                decision, _ = coordinator.decide()
                coordinator.announce(decision)
                return self._decided(journal)
            self._asked[worker] = time.monotonic()
            return self._trial(worker, assignment, coordinator.candidate(assignment.candidate))

    def can_win(self, trial: Trial, measured: ReportedLosses) -> bool:
        """Whether a trial's candidate may win after what it measured.

        Raises:
            RunError: if the trial is not open, or was not evaluated on the batches of the others.
        """
        with self._replayed() as (coordinator, _):
            candidate = _open_candidate(coordinator, trial)
            self._check_batches(coordinator, measured)
            rows = (*candidate.dir.curve(), *measured.evaluations)
            result = ProbeResult(trial.index, trial.last_step, measured.steps, evaluations=rows)
            return not measured.failure and coordinator.needs_checkpoint(result)

    def tell(self, trial: Trial, measured: ReportedLosses) -> None:
        """Record what a trial measured and commit its state.

        Raises:
            RunError: as :meth:`can_win` does, or if its state is missing; nothing was recorded.
        """
        files = {}
        if self.can_win(trial, measured):
            files = saved_files(trial.save_dir)  # not under the lock: states can be large
            if not files:
                raise RunError(
                    f"{trial.id}: no state in {trial.save_dir}, and the candidate can still win. "
                    "Save it there, then tell again. Nothing was recorded."
                )
        with self._replayed() as (coordinator, _):
            candidate = _open_candidate(coordinator, trial)
            folder, base, state = candidate.dir, self._event.base_step, None
            folder.add(CURVE, measured.evaluations)
            training = measured.training
            folder.add(TRAINING, [{"step": base + s, "train/loss": loss} for s, loss in training])
            folder.flush()
            if files:
                state = folder.state_at(trial.last_step)
                commit_state(state, files, step=base + trial.last_step, trial=trial)
            now = time.monotonic()
            result = ProbeResult(
                candidate=trial.index,
                rung=trial.last_step,
                steps=measured.steps,
                evaluations=tuple(folder.curve()),
                state=state.name if state else None,
                failure=measured.failure,
                seconds=now - self._asked.pop(trial.worker, now),
            )
            coordinator.record(trial.worker, result)
            folder.keep_only(state)

    @contextlib.contextmanager
    def _replayed(self) -> Iterator[tuple[Coordinator, Journal]]:
        """The coordinator as the journal has it now; nobody else changes it within."""
        with self._mutex, self.directory.locked():
            journal = Journal(self.directory.run.journal)
            self._coordinator.refresh(journal, at_work=self.directory.is_at_work)
            yield self._coordinator, journal

    def _decided(self, journal: Journal) -> Winner | None:
        event, run = self._event, self.directory.run
        line = journal.find("decision", growth=event.number)
        if line is None:
            return None
        self.directory.release()
        decision = self.directory.decision(event.number)
        plan = next(c.plan for c in event.pool if c.id == line["chosen"])
        return Winner(
            id=line["chosen"],
            plan=plan,
            state=run.root / line["state"],
            steps=decision["lag"],
            ties=tuple(decision["ties"]),
        )

    def _trial(self, worker: int, assignment: Assignment, candidate: CandidateState) -> Trial:
        """The trial, from the candidate's last recorded state; what came after that is removed."""
        saved = candidate.saved_state if candidate.has_saved_state else None
        if saved:
            manifest.check_sizes(saved)
        candidate.dir.keep_only(saved)
        first = candidate.dir.resume(rung=assignment.rung, usable=lambda state: state == saved)
        save_dir = manifest.temporary(candidate.dir.state_at(assignment.rung))
        save_dir.mkdir()
        return Trial(
            id=candidate.id,
            plan=self._event.pool[candidate.index].plan,
            index=candidate.index,
            worker=worker,
            attempt=candidate.attempts,
            is_first=saved is None,
            state=saved or self._event.base,
            first_step=first,
            last_step=assignment.rung,
            evaluate_at=tuple(
                step
                for step in self._event.evaluations
                if (saved is None or step > first) and step <= assignment.rung
            ),
            save_dir=save_dir,
        )

    def _check_batches(self, coordinator: Coordinator, measured: ReportedLosses) -> None:
        """All candidates are evaluated on the same batches, so that losses can be paired."""
        for row in measured.evaluations:
            number = len(row.get("val_loss_batches", ()))
            for index in range(len(self._event.pool)):
                other = coordinator.candidate(index)
                known = other.curve.get(row["step"])
                if known is not None and len(known.batches) != number:
                    raise RunError(
                        f"losses at step {row['step']} are of {number} batches, but {other.id} has "
                        f"{len(known.batches)} there. Evaluate all candidates on the same batches. "
                        "Nothing was recorded."
                    )


def _open_candidate(coordinator: Coordinator, trial: Trial) -> CandidateState:
    """The candidate of a trial that has been handed out and not been recorded."""
    candidate = coordinator.candidate(trial.index)
    if (candidate.group, candidate.attempts) != (trial.worker, trial.attempt):
        raise RunError(
            f"{trial.id} to step {trial.last_step}: this trial is not open: it was told, or was "
            "asked for again, since. Tell the trial that the last ask returned."
        )
    return candidate
