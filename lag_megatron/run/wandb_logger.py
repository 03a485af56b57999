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
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lag_megatron.config import TrackingConfig
from lag_megatron.run.metrics import Console, MetricRow
from lag_megatron.run.wandb_runs import WandbRuns

_QUEUE_LIMIT = 100_000
_FINISH_SECONDS = 60.0
_CRASH_SECONDS = 10.0
_MODES = ("online", "offline", "shared", "disabled")
_OLD_MODES = {"run": "online", "dryrun": "offline"}  # which W&B still takes


class Wandb:
    """The group of W&B runs of one training run; its calls return at once and never raise."""

    def __init__(
        self, tracking: TrackingConfig, *, folder: Path, config: Mapping[str, Any], console: Console
    ) -> None:
        self._console = console
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(_QUEUE_LIMIT)
        self._off = threading.Event()
        self._worker: threading.Thread | None = None
        mode = _mode(tracking.wandb.mode)
        if mode == "disabled":
            self._off.set()
        elif mode not in _MODES:
            self._switch_off(f"WANDB_MODE is {mode!r}, expected one of {', '.join(_MODES)}")
        self._runs = WandbRuns(tracking.wandb.project, mode, folder, config, console)
        if mode == "offline":
            why = " (no API key)" if tracking.wandb.mode == "auto" else ""
            console.print(
                f"W&B is offline{why}. To upload later: "
                f"wandb sync {shlex.quote(str(folder))}/wandb/offline-*"
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
            self._switch_off(f"{type(error).__name__}: {error}")

    def _begin(self) -> None:
        import wandb

        wandb.setup()  # which ends W&B's process at exit: what is registered after it runs before
        atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        self.finish(exit_code=1, timeout=_CRASH_SECONDS)

    def _switch_off(self, why: str) -> None:
        if not self._off.is_set():
            self._off.set()
            self._console.warn(f"W&B failed and is off for this run: {why}")


def _mode(wanted: str) -> str:
    """Where W&B writes; ``auto`` asks the environment, of which an empty variable says nothing."""
    if wanted != "auto":
        return wanted
    given = os.environ.get("WANDB_MODE", "")
    if given:
        return _OLD_MODES.get(given, given)
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return bool(server) and server in netrc.read_text(errors="replace")
    except OSError:
        return False
