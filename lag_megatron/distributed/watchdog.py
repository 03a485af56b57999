"""A time limit for work that can hang where no exception reaches it."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_STDERR = 2
_WRITING_SECONDS = 20.0


class Watch:
    """Ends this process, stacks written first, when nobody touches it for some time.

    Args:
        seconds: the time.
        stacks: the file for the stacks of all threads; they go to standard error too.
        on_expiry: called before the end, to leave word; says what to tell the user.
    """

    def __init__(self, seconds: float, *, stacks: Path, on_expiry: Callable[[], str]) -> None:
        self._seconds, self._stacks, self._on_expiry = seconds, stacks, on_expiry
        self._changed = threading.Condition()
        self._deadline: float | None = time.monotonic() + seconds
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def touch(self) -> None:
        """There was progress: the time begins anew."""
        self._set(time.monotonic() + self._seconds)

    def end(self) -> None:
        """The work is done."""
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
        self._end()

    def _end(self) -> None:
        """Leave word and end, even where the file system is what hangs."""
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
    """A watch over a block, or none; gives what to call at each progress."""
    if seconds is None:
        yield lambda: None
        return
    watch = Watch(seconds, stacks=stacks, on_expiry=on_expiry)
    try:
        yield watch.touch
    finally:
        watch.end()
