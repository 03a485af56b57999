"""Locks on files, which the kernel releases when their process ends, however it ends."""

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lag_megatron.errors import RunError


def lock_file(
    path: Path, *, timeout: float, refusal: Callable[[str], str], poll_seconds: float = 0.5
) -> IO[str]:
    """Lock a file, which then names its process; the lock is held while the result is open.

    Args:
        path: the file; its folder exists.
        timeout: seconds to wait for another holder.
        refusal: the message of the error, given who holds the lock.
        poll_seconds: between two attempts.

    Raises:
        RunError: if another holder keeps it.
    """
    file = path.open("a+")
    deadline = time.monotonic() + timeout
    while not _locked(file, path):
        if time.monotonic() >= deadline:
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            file.close()
            raise RunError(refusal(holder))
        time.sleep(poll_seconds)
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


def is_locked(path: Path) -> bool:
    """Whether some process, this one included, holds the lock on a file."""
    if not path.exists():
        return False
    with path.open("a+") as file:
        return not _locked(file, path)


def _locked(file: IO[str], path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        file.close()
        raise RunError(f"{path}: cannot lock: {error.strerror}.") from None
    return True
