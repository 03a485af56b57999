"""W&B beside the run directory: a run for each stage and each probe, all in one group.

Only the coordinator's rank has one.  Training never waits for it: calls go into a queue, and a
thread makes them.  An error there is printed once and switches W&B off for the rest of the run; the
run directory has everything that W&B shows.
"""

import atexit
import os
import queue
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lag_megatron.config import TrackingConfig
from lag_megatron.errors import ConfigError
from lag_megatron.run.metrics import Console, MetricRow
from lag_megatron.run.wandb_environment import unset_empty_variables, wandb_places
from lag_megatron.run.wandb_failure import (
    describe_failure,
    end_process,
    report_log_failures,
    require_writable,
)
from lag_megatron.run.wandb_runs import WandbRuns

_QUEUE_LIMIT = 100_000
_FINISH_SECONDS = 60.0
_CRASH_SECONDS = 10.0


class Wandb:
    """The group of W&B runs of one training run; its calls return at once and never raise."""

    def __init__(
        self, tracking: TrackingConfig, *, folder: Path, config: Mapping[str, Any], console: Console
    ) -> None:
        self._console = console
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(_QUEUE_LIMIT)
        self._off = threading.Event()
        self._worker: threading.Thread | None = None
        settings = tracking.wandb
        try:
            self._places = wandb_places(settings, folder, os.environ)
        except ConfigError as error:
            self._switch_off(str(error))
            self._places = wandb_places(replace(settings, mode="disabled"), folder, os.environ)
        if self._places.mode == "disabled":
            self._off.set()
        self._runs = WandbRuns(self._places, folder, config, console)
        if self._places.mode == "offline":
            why = " (no API key)" if _asks_for_a_key(tracking) else ""
            console.print(
                f"W&B is offline{why}. To upload later: "
                f"wandb sync {shlex.quote(str(self._places.files))}/offline-*"
            )

    def log(self, row: MetricRow) -> None:
        """Add one line of metrics to the run of its stage; ``tokens`` is the x-axis."""
        self._enqueue(partial(self._runs.log, dict(row)))

    def probe(
        self,
        growth: int,
        candidate: str,
        rows: Sequence[MetricRow],
        *,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Add to the run of a candidate what was measured since the last call.

        Args:
            growth: the growth event's number.
            candidate: the candidate's id.
            rows: ``step``, which counts from growth, ``tokens``, and ``val/loss``, ``train/loss``…
            summary: values of the whole probe, such as its status.
        """
        copies = [dict(row) for row in rows]
        self._enqueue(partial(self._runs.probe, growth, candidate, copies, dict(summary or {})))

    def event(
        self,
        growth: int,
        *,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        curves: Mapping[str, Sequence[tuple[int, float]]],
        images: Callable[[], Mapping[str, Path]],
        files: Sequence[Path],
        summary: Mapping[str, Any],
    ) -> None:
        """Show a decided growth event in the run of the stage that it begins.

        Args:
            growth: the event's number, which is its stage's.
            columns: names of the table ``growth01/candidates``.
            rows: its rows, one a candidate.
            curves: per candidate its (step after growth, validation loss), for one common chart.
            images: draws picture files, shown as ``growth01/<name>``; called in W&B's thread.
            files: what the artifact ``<run>-growth01`` holds: plan and decision.
            summary: values for the run's summary.
        """
        show = partial(
            self._runs.event,
            growth,
            columns=list(columns),
            rows=[list(row) for row in rows],
            curves={name: list(points) for name, points in curves.items()},
            images=images,
            files=list(files),
            summary=dict(summary),
        )
        self._enqueue(show)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values in the summary of the stage's run, or of the next one if none is open."""
        self._enqueue(partial(self._runs.summary, dict(values)))

    def finish(self, *, exit_code: int, timeout: float = _FINISH_SECONDS) -> None:
        """Make the calls that are still in the queue, and close the runs.

        Args:
            exit_code: of the training run.
            timeout: in seconds, after which the rest is dropped with a warning.
        """
        worker = self._worker
        if worker is None or self._off.is_set():
            return
        self._enqueue(partial(self._runs.finish, exit_code))
        self._enqueue(None)
        worker.join(timeout)
        if worker.is_alive():
            self._switch_off(f"not all of it was written within {timeout:.0f} s")
        self._off.set()
        atexit.unregister(self._at_exit)

    def _enqueue(self, call: Callable[[], object] | None) -> None:
        if self._off.is_set():
            return
        if self._worker is None:
            self._worker = threading.Thread(
                target=self._make_calls, name="wandb-logger", daemon=True
            )
            self._worker.start()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._switch_off(f"it does not keep up: {_QUEUE_LIMIT} writes are waiting")

    def _make_calls(self) -> None:
        try:
            self._begin()
            for call in iter(self._calls.get, None):
                if self._off.is_set():
                    return
                call()
        except (Exception, SystemExit) as error:  # of any kind: training goes on without W&B
            self._switch_off(describe_failure(error, self._places.files))
            end_process()

    def _begin(self) -> None:
        import wandb

        unset_empty_variables()
        require_writable(self._places.files)
        report_log_failures(lambda e: self._switch_off(describe_failure(e, self._places.files)))
        # W&B's process is ended at exit: what is registered after it runs before.
        wandb.setup(wandb.Settings(silent=True))
        atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        self.finish(exit_code=1, timeout=_CRASH_SECONDS)

    def _switch_off(self, why: str) -> None:
        if not self._off.is_set():
            self._off.set()
            self._console.warn(f"W&B failed and is off for this run, which goes on: {why}")


def _asks_for_a_key(tracking: TrackingConfig) -> bool:
    """Whether a key would have made W&B go online."""
    return tracking.wandb.mode == "auto" and not os.environ.get("WANDB_MODE")
