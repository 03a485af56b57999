"""A search that a training program of its own drives: ask for a trial, train it, tell its losses.

The journal, the rules, the files and the report are those of a run's growth event.  Nothing is kept
in memory alone: each call reads the journal again under the directory's lock, so several processes
may work on one search, and a killed one costs what it was training.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lag_megatron.config.schema.ranges import require_positive, require_whole
from lag_megatron.errors import ConfigError, RunError
from lag_megatron.growth.pool import Candidate, pool
from lag_megatron.report import write_report
from lag_megatron.search.ask_tell.rank0 import on_rank0, wait_for_all_ranks
from lag_megatron.search.ask_tell.reported_losses import ReportedLosses, check_losses
from lag_megatron.search.ask_tell.rules import Halving, Lag
from lag_megatron.search.ask_tell.search_directory import SearchDirectory, read_settings
from lag_megatron.search.ask_tell.trial import Trial, Winner
from lag_megatron.search.ask_tell.trial_store import TrialStore
from lag_megatron.search.event import GrowthEvent
from lag_megatron.search.step_costs import StepCosts

__all__ = ["Halving", "Lag", "Search", "Trial", "Winner", "pool"]

_POLL_SECONDS = 0.25


class Search:
    """A search over candidates of one growth.

    In a program of several ranks (an initialised ``torch.distributed``) every rank makes one and
    calls its methods together with the others: rank 0 reads and writes, the others get its answer.

    Args:
        directory: where its files lie; a search that is there already is gone on with.
        base: the checkpoint that all candidates grow from, of any format.
        pool: the candidates, of :func:`pool` or one's own.
        rule: how candidates are stopped and the winner is chosen.
        base_val_loss: validation loss of the base in nats, for the report.
        costs: what steps and evaluations cost, for the report.

    Raises:
        CheckpointError: if there is no checkpoint at ``base``.
        ConfigError: if the rule contradicts itself, or ``base_val_loss`` is not above 0.
        RunError: if the directory holds another search or a training run.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        base: str | Path,
        pool: Sequence[Candidate],
        rule: Lag | Halving,
        base_val_loss: float | None = None,
        costs: StepCosts | None = None,
    ) -> None:
        if base_val_loss is not None:
            require_positive(base_val_loss, "base_val_loss", error=ConfigError)
        self._root, self._growth, checked = (
            Path(directory).absolute(),
            rule.settings(),
            _checked(pool),
        )

        def open_store() -> Winner | None:
            event = GrowthEvent(
                number=1,
                base=Path(base).absolute(),
                base_step=_base_step(self._root, Path(base)),
                base_val_loss=base_val_loss,
                source_layers=checked[0].plan.source_layers,
                target_layers=checked[0].plan.target_layers,
                stage_steps=self._growth.last_rung,
                growth=self._growth,
                pool=checked,
            )
            self._store = TrialStore(SearchDirectory(self._root), event, costs)
            return self._store.open()

        self._winner = on_rank0(open_store)

    def ask(self, *, worker: int = 0) -> Trial | None:
        """The next trial of a worker; None when the search is decided.

        Waits while other workers train all that is left.  A worker that has not told its last
        trial, or whose process was killed before it had, gets that one again, as long as no other
        worker has taken it over.

        Args:
            worker: number of this worker; threads and processes that work on one search at a time
                each have their own.

        Raises:
            RunError: if no candidate is left, another process is this worker, or it is below 0.
        """
        require_whole(worker, "ask(worker=...)", error=RunError)
        while self._winner is None:
            answer = on_rank0(lambda: self._store.poll(worker))
            if isinstance(answer, Winner):
                self._winner = answer
            elif answer is None:
                time.sleep(_POLL_SECONDS)
            elif answer.worker != worker:
                raise RunError(
                    f"ask(worker={worker}): rank 0 asked for worker {answer.worker}. The ranks of "
                    "one torch.distributed group train one trial together; start a job for each "
                    "worker."
                )
            else:
                return answer
        return None

    def needs_state(self, trial: Trial, losses: Mapping[int, Any]) -> bool:
        """Whether a trial with these losses can still win, so that its state has to be saved.

        Args:
            trial: of the last ``ask``.
            losses: as for :meth:`tell`.

        Raises:
            RunError: for steps that were not asked for or are missing, or a trial that is not open.
        """
        return on_rank0(lambda: self._store.can_win(trial, self._check(trial, losses)))

    def tell(
        self,
        trial: Trial,
        losses: Mapping[int, Any] | None = None,
        *,
        train_losses: Mapping[int, float] | None = None,
        failed: str = "",
    ) -> None:
        """Record what a trial measured, commit its state, and delete states that cannot win.

        A trial whose loss is not finite or is above the rule's ``max_loss`` has failed.

        Args:
            trial: of the last ``ask``.
            losses: by step after growth, the validation loss in nats a token, or a list of those of
                the batches of the fixed validation set, which lets ties be found.
            train_losses: by step after growth, the training loss.
            failed: why the candidate has lost, e.g. ``out of memory``; losses may then be missing.

        Raises:
            RunError: for steps that were not asked for or are missing, a state that is missing, or
                a trial that is not open.  Nothing was recorded then.
        """
        wait_for_all_ranks()  # all have saved
        measured = self._check
        on_rank0(lambda: self._store.tell(trial, measured(trial, losses, train_losses, failed)))

    @property
    def best(self) -> Winner:
        """The winner.

        Raises:
            RunError: as long as the search is not decided.
        """
        if self._winner is None:
            raise RunError(f"{self._root}: not decided yet. Ask until there is no trial left.")
        return self._winner

    def report(self) -> Path:
        """Write ``report.html``, ``report.md`` and figures; returns the first's path."""
        return on_rank0(lambda: write_report(self._root))

    def close(self) -> None:
        """Give up this object's workers, so that another one may take their trials over."""
        on_rank0(lambda: self._store.directory.release())

    def _check(
        self,
        trial: Trial,
        losses: Mapping[int, Any] | None,
        train_losses: Mapping[int, float] | None = None,
        failed: str = "",
    ) -> ReportedLosses:
        return check_losses(
            trial, losses or {}, train_losses or {}, failed=failed, growth=self._growth
        )


def _checked(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates of a pool; all grow one model to one depth."""
    checked = tuple(candidates)
    depths = {(c.plan.source_layers, c.plan.target_layers) for c in checked}
    if len(depths) != 1 or len({c.id for c in checked}) < len(checked):
        raise RunError(
            "pool: candidates with one source depth, one target depth and ids of their own are "
            f"needed (got {[(c.id, c.plan.source_layers, c.plan.target_layers) for c in checked]})."
        )
    return checked


def _base_step(root: Path, base: Path) -> int:
    """Optimizer steps that the base has seen: as the search noted them, or from its files."""
    if before := read_settings(root):
        return int(before["base_step"])
    from lag_megatron.checkpoint.open import open_checkpoint  # imports torch

    return open_checkpoint(base).step
