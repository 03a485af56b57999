"""The directory of a search by ask and tell, which several processes may share.

A process locks it for the moment of an ``ask`` or ``tell``, reads the journal again and adds to it.
A trial is a worker's from its line in the journal on, for as long as the worker's own lock is held;
the kernel releases that lock when the worker's process ends, and the trial is handed out again.
"""

import contextlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lag_megatron.errors import RunError
from lag_megatron.run.directory import (
    DAMAGED_RUN,
    SEARCH_SETTINGS,
    RunDirectory,
    read_decision,
    write_json,
)
from lag_megatron.small_files import read_json
from lag_megatron.targets.file_lock import is_locked, lock_file

_LOCK_TIMEOUT_SECONDS = 600.0  # a tell may be deleting large states
_WORKER_TIMEOUT_SECONDS = 40.0  # to wait for a process that is just ending


class SearchDirectory:
    """Files of one search; laid out as a run directory's, without stages.

    Args:
        root: the directory.

    Raises:
        RunError: if a training run is in it.
    """

    def __init__(self, root: Path) -> None:
        if (root / "config.yaml").exists():
            raise RunError(
                f"{root}: holds a training run, whose own searches are part of it. Give the "
                "search another directory."
            )
        root.mkdir(parents=True, exist_ok=True)
        self.run = RunDirectory(root)
        self._workers: dict[int, IO[str]] = {}
        weakref.finalize(self, _close_all, self._workers)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory alone."""
        path = self.run.root / "lock"

        def refusal(holder: str) -> str:
            return f"{path}: held by {holder} for {_LOCK_TIMEOUT_SECONDS:g} s. Look what it does."

        with lock_file(path, timeout=_LOCK_TIMEOUT_SECONDS, refusal=refusal, poll_seconds=0.02):
            yield

    def decision(self, growth: int) -> dict[str, Any]:
        """The decision of a growth event.

        Raises:
            RunError: if the file is missing or damaged.
        """
        return read_decision(self.run.growth(growth))

    def claim(self, settings: dict[str, Any]) -> None:
        """Make the directory that of a search with these settings, or check that it is.

        Raises:
            RunError: if it belongs to another search, or to one whose settings are lost.
        """
        settings, before = json.loads(json.dumps(settings)), read_settings(self.run.root)
        if before is None:
            if self.run.journal.exists():
                raise RunError(
                    f"{self.run.root / SEARCH_SETTINGS}: missing, but {self.run.journal.name} says "
                    "that a search was begun there, whose settings it held. Restore it from a "
                    "copy, or give another directory."
                )
            write_json(self.run.root / SEARCH_SETTINGS, settings)
        elif changed := sorted(_differences(before, settings, "")):
            raise RunError(
                f"{self.run.root}: holds a search with other settings: {', '.join(changed)}. Give "
                "another directory, restore the settings, or remove it to start anew."
            )

    def hold_worker(self, worker: int) -> None:
        """Be this worker until the process ends or :meth:`release` is called.

        Raises:
            RunError: if another process, or another search of this one, is this worker.
        """
        if worker in self._workers:
            return
        path = self._worker_lock(worker)
        path.parent.mkdir(exist_ok=True)

        def refusal(holder: str) -> str:
            return (
                f"{path}: {holder} is worker {worker} of this search already. Give each worker "
                f"its own number: ask(worker={worker + 1})."
            )

        self._workers[worker] = lock_file(
            path, timeout=_WORKER_TIMEOUT_SECONDS, refusal=refusal, poll_seconds=0.05
        )

    def release(self) -> None:
        """Be no worker any more."""
        _close_all(self._workers)

    def is_at_work(self, worker: int) -> bool:
        """Whether some process is this worker."""
        return is_locked(self._worker_lock(worker))

    def _worker_lock(self, worker: int) -> Path:
        return self.run.root / "workers" / f"{worker}.lock"


def read_settings(root: Path) -> dict[str, Any] | None:
    """What the search in a directory was begun with; None if none was.

    Raises:
        RunError: if the file is damaged.
    """
    path = root / SEARCH_SETTINGS
    if not path.exists():
        return None
    settings: dict[str, Any] = read_json(
        path, what="the settings of a search", error=RunError, advice=DAMAGED_RUN
    )
    return settings


def _close_all(files: dict[int, IO[str]]) -> None:
    for file in files.values():
        file.close()
    files.clear()


def _differences(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            yield from _differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
    elif before != after:
        yield f"{path} ({before!r} there, {after!r} now)"
