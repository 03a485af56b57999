"""A pool of processes that yields results in the order of the tasks."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver, resource_tracker
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from lag_megatron.errors import DataError
from lag_megatron.process.interrupts import deferred_interrupts

T = TypeVar("T")
R = TypeVar("R")


class WorkerPool:
    """Worker processes that end with this one; with a count of 1 this process does the work.

    Args:
        count: of the processes.
    """

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            with deferred_interrupts():
                self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[T], R], tasks: Sequence[T], *, label: str) -> Iterator[R]:
        """Yield ``function(task)`` of each task in order, with a bar on a terminal.

        Raises:
            DataError: what a worker raised, or that one was killed.
        """
        with contextlib.closing(_bar(label, len(tasks))) as bar:
            try:
                for result in self._results(function, tasks):
                    bar.update()
                    yield result
            except BrokenProcessPool:
                raise DataError(
                    f"{label}: a worker process was killed, perhaps for memory. Take fewer "
                    "workers; the same command goes on from here."
                ) from None

    def _results(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        if self._count == 1 or len(tasks) < 2:
            return map(function, tasks)
        return self._in_processes(function, tasks)

    def _in_processes(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        with deferred_interrupts() as interrupts:
            if self._pool is None:
                self._pool = self._start()
            left = deque(self._pool.submit(function, task) for task in tasks)
            while left:  # results are dropped as they are taken
                task = left.popleft()
                interrupts.wait_for([task])
                yield task.result()

    def _start(self) -> ProcessPoolExecutor:
        # A server that has imported everything once forks the workers: this process may run
        # threads, and a fresh interpreter each would import torch each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lag_megatron.data.prepare.tokenize"])
        _start_quietly()
        return ProcessPoolExecutor(self._count, mp_context=context, initializer=_begin_worker)


def _start_quietly() -> None:
    """Start the server without what Megatron and torch say at import of optional packages.

    Warning filters reach the server's interpreter only through the environment.  The server blocks
    Ctrl-C from its start, as its workers do: a terminal sends it to all of them.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    resource_tracker.ensure_running()  # where it is not running, it unblocks SIGINT in the end
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _begin_worker() -> None:
    """Ignore Ctrl-C, use one thread, and exit when the parent process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="parent").start()


def _bar(label: str, total: int) -> tqdm:
    return tqdm(desc=label, total=total, unit="chunk", disable=not sys.stderr.isatty())
