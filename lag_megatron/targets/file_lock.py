"""Locks on files, which the kernel releases when their process ends, however it ends.

The text in a lock's file names its holder for messages; it never decides who holds the lock.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from lag_megatron.errors import LagError, RunError

_TAKEN = (errno.EAGAIN, errno.EACCES)
_HOLDER_LENGTH = 300

# Open locks of this process.  A fork copies their descriptors, and the copies would keep a lock
# after its owner was killed, so a forked child closes them.
_HELD: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def lock_file(
    path: Path,
    *,
    timeout: float,
    refusal: Callable[[str], str],
    poll_seconds: float = 0.5,
    waiting: Callable[[], object] = lambda: None,
    way_out: str = "Use another file system.",
) -> IO[str]:
    """Lock a file, which then names its process; the lock is held while the result is open.

    Args:
        path: the file; its folder exists.
        timeout: seconds to wait for another holder.
        refusal: the message of the error, given who holds the lock.
        poll_seconds: between two attempts.
        waiting: called once if there is another holder to wait for.
        way_out: what to do where the file system has no locks, for the message.

    Raises:
        RunError: if another holder keeps it, or the file system has no locks.
        OSError: if the file cannot be made.
    """
    deadline, told = time.monotonic() + timeout, False
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        if _locked(file, path, way_out):
            # The holder before may have removed the file; then the next process locks another.
            if _is_at(file, path):
                break
            file.close()
            continue
        with file:
            if time.monotonic() >= deadline:
                raise RunError(refusal(_holder(file)))
        if not told:
            waiting()
            told = True
        time.sleep(poll_seconds)
    _HELD.add(file)
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), _own_name().encode())
    return file


def is_locked(path: Path) -> bool:
    """Whether some process, this one included, holds the lock on a file."""
    if not path.exists():
        return False
    with path.open("a+") as file:
        return not _locked(file, path, "Use another file system.")


@contextlib.contextmanager
def sole_writer(
    target: Path, *, lock: bool = True, timeout: float = 0, error: type[LagError] = RunError
) -> Iterator[None]:
    """Be the only process that writes a target, by a lock on ``<target>.lock`` beside it.

    The file is removed at the end.

    Args:
        target: a file or directory to write, which need not exist.
        lock: without it nothing is locked, for file systems that have no locks.
        timeout: seconds to wait for another writer.
        error: what to raise where the lock's file cannot be made.

    Raises:
        RunError: if another process writes the target, or the file system has no locks.
    """
    if not lock:
        yield
        return
    place = target.resolve()  # links to one target share its lock
    path = place.parent / f"{place.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock_file(
            path,
            timeout=timeout,
            refusal=lambda holder: (
                f"{target}: is being written by {holder}. Wait until it ends, stop it, or name "
                "another target."
            ),
            poll_seconds=0.05,
            way_out="Name a target elsewhere, or give --no-lock (lock=False in a program) if no "
            "other process writes this one.",
        )
    except OSError as problem:
        why = problem.strerror or str(problem)
        if isinstance(problem, FileExistsError):  # of mkdir, where a file is in the way
            why = os.strerror(errno.ENOTDIR)
        raise error(f"{path}: cannot write there: {why}. Name another target.") from None
    try:
        yield
    finally:
        if not file.closed:  # a forked child has closed its copy
            with contextlib.suppress(OSError), file:
                path.unlink()  # before the lock is released: after that it may be another's


def _locked(file: IO[str], path: Path, way_out: str) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        file.close()
        raise RunError(
            f"{path}: cannot lock: {error.strerror}. This file system has no locks, so two writers "
            f"would not notice each other. {way_out}"
        ) from None
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _own_name() -> str:
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] not in ("", "-c") else "python"
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"{program} (pid {os.getpid()} on {os.uname().nodename}, since {since})\n"


def _holder(file: IO[str]) -> str:
    file.seek(0)
    text = file.read(_HOLDER_LENGTH).strip()
    return "".join(c if c.isprintable() else "?" for c in text) or "an unknown process"


def _close_all() -> None:
    for file in list(_HELD):
        file.close()


os.register_at_fork(after_in_child=_close_all)
