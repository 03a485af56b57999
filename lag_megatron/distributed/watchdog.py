"""A watchdog: a time limit for work that can hang where no exception reaches it."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_STDERR = 2
_WRITING_SECONDS = 20.0


class Watchdog:
    """Writes the stacks of all threads and ends this process, unless it is reset in time.

    Args:
        seconds: from the start, or the last reset, to the end of the process.
        stacks: the file for the stacks; they go to standard error too.
        on_expiry: called before the process ends; returns the message for the user.
    """

    def __init__(self, seconds: float, *, stacks: Path, on_expiry: Callable[[], str]) -> None:
        self._seconds, self._stacks, self._on_expiry = seconds, stacks, on_expiry
        self._changed = threading.Condition()
        self._deadline: float | None = time.monotonic() + seconds
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    def reset(self) -> None:
        """Start the time again: there was progress."""
        self._set(time.monotonic() + self._seconds)

    def stop(self) -> None:
        """Let the process live: the work is done."""
        self._set(None)

    def _set(self, deadline: float | None) -> None:
        with self._changed:
            self._deadline = deadline
            self._changed.notify_all()

    def _run(self) -> None:
        with self._changed:
            while self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            else:
                return
        self._expire()

    def _expire(self) -> None:
        """Write the stacks and the message, and end even if the file system is what hangs."""
        threading.Timer(_WRITING_SECONDS, os._exit, (1,)).start()
        try:
            faulthandler.dump_traceback(_STDERR, all_threads=True)
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            os.write(_STDERR, f"{self._on_expiry()}\n".encode())
        finally:
            os._exit(1)  # an exception would not reach a thread that waits in a collective


@contextlib.contextmanager
def watched(
    seconds: float | None, *, stacks: Path, on_expiry: Callable[[], str]
) -> Iterator[Callable[[], None]]:
    """A watchdog over a block, or none without ``seconds``; yields what to call at progress."""
    if seconds is None:
        yield lambda: None
        return
    watchdog = Watchdog(seconds, stacks=stacks, on_expiry=on_expiry)
    try:
        yield watchdog.reset
    finally:
        watchdog.stop()
