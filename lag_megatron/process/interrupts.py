"""Signals, kept from interrupting code that shares locks with other threads.

CPython calls a signal's handler between any two instructions of the main thread.  A handler that
raises, as Ctrl-C's does, may come right after a lock of ``threading`` was acquired and before
``with`` knows of it: the lock stays acquired, and other threads wait for it for ever.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from types import FrameType
from typing import Any

_SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], Any]


@dataclass(frozen=True, slots=True)
class _Deferred:
    """A signal that has come."""

    number: int
    frame: FrameType | None
    handler: Handler

    def handle(self) -> None:
        self.handler(self.number, self.frame)


class DeferredInterrupts:
    """Where signals wait for the next :meth:`wait_for`, or the end of the block."""

    def __init__(self) -> None:
        # In C: a handler may put something into it while this thread takes something out of it.
        self.queue: SimpleQueue[Future[Any] | _Deferred] = SimpleQueue()

    def wait_for(self, tasks: Sequence[Future[Any]]) -> None:
        """Wait until all tasks have ended; raises what the first failing one raised.

        The handlers of signals that came, or come meanwhile, are called here, and what they raise
        is raised.
        """
        for task in tasks:
            task.add_done_callback(self.queue.put)
        missing = set(tasks)
        while missing:
            ended = self.queue.get()
            if isinstance(ended, _Deferred):
                ended.handle()
            elif ended in missing:
                missing.remove(ended)
                ended.result()

    def handle(self) -> None:
        """Call the handlers of signals that have come."""
        while not self.queue.empty():
            found = self.queue.get()
            if isinstance(found, _Deferred):
                found.handle()


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[DeferredInterrupts]:
    """Keep the handlers of SIGINT and SIGTERM from being called in the block, except on request.

    They are called by the methods of what is yielded, and at the end of the block unless it raises.
    Outside the main thread, where handlers are never called, nothing is changed.
    """
    deferred = DeferredInterrupts()
    before: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):  # neither ignored, nor left to the system
                before[number] = handler

    def defer(number: int, frame: FrameType | None) -> None:
        deferred.queue.put(_Deferred(number, frame, before[number]))

    try:
        for number in before:
            signal.signal(number, defer)
        yield deferred
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    deferred.handle()
