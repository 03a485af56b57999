"""Folders that are being made: one process at a time, and only what it began itself."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lag_megatron.atomic_io import flush_to_disk
from lag_megatron.errors import DataError

_MARKER = "draft.json"
_LOCK = "lock"
_UNMARKED = "draft.part"


@contextlib.contextmanager
def exclusive(folder: Path, *, digest: str, complete: Path | None = None) -> Iterator[Path]:
    """A folder to make something in, alone, that outlives a kill; the next call goes on with it.

    Args:
        folder: made if it is not there.
        digest: of what is made; a folder that was begun for something else is refused.
        complete: the file that is in the folder once it is complete, perhaps by the process that
            we waited for: then the caller looks itself at what is there, alone as well.

    Raises:
        DataError: if the folder holds what this program did not begin with this digest.
    """
    _require_own(folder, complete)  # a folder that is refused is left without our lock
    with _locked(folder):
        if complete is not None and complete.is_file():
            try:
                yield folder
            finally:
                finish(folder)
            return
        _require_own(folder, complete)
        _begin(folder, digest)
        yield folder


def finish(folder: Path) -> None:
    """The folder is complete as it is: remove what marks it as begun."""
    for name in (_MARKER, _LOCK):
        (folder / name).unlink(missing_ok=True)
    flush_to_disk(folder)


def publish(made: Path, target: Path) -> None:
    """Rename a complete folder into place, where at most an empty one may stand.

    Raises:
        DataError: if there are files in the way.
    """
    flush_to_disk(made)
    try:
        made.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise foreign(target) from None
        raise
    flush_to_disk(target.parent)


def require_free(target: Path) -> None:
    """Refuse a place where something stands already.

    Raises:
        DataError: naming it.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise foreign(target)


def foreign(target: Path) -> DataError:
    """The message for a place that holds something else."""
    return DataError(
        f"{target}: holds files, but no complete prepared data. Give a folder that is new or "
        "empty, or delete this one."
    )


def remove(folder: Path) -> None:
    """Remove a staging folder, whose content has been published.

    Its marker and lock go last: nobody ever sees there files of unknown origin.
    """
    last = (_MARKER, _LOCK)
    for path in (folder / name for name in (*(_names(folder) - set(last)), *last)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            # What cannot be removed only takes room; another process may be removing it, too.
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _require_own(folder: Path, complete: Path | None) -> None:
    names = _names(folder)
    # Another process may be at work: what is asked is one look at the names, for it removes the
    # marker after the rest; and only then the file, for it is there before the marker goes.
    if _MARKER in names or (complete is not None and complete.is_file()):
        return
    if others := sorted(names - {_LOCK, _UNMARKED}):
        raise DataError(
            f"{folder}: holds files that are not prepared data ({', '.join(others[:3])}). "
            "Give a folder that is new or empty."
        )


def _begin(folder: Path, digest: str) -> None:
    marker, part = folder / _MARKER, folder / _UNMARKED
    if not marker.is_file():
        part.write_text(json.dumps({"digest": digest}), encoding="utf-8")
        part.rename(marker)
    elif (begun := _digest_of(marker)) != digest:
        raise DataError(
            f"{folder}: half-written, from other text or settings ({begun} then, {digest} now). "
            "Start what was begun there again, or delete the folder."
        )


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _digest_of(marker: Path) -> str:
    try:
        return str(json.loads(marker.read_text(encoding="utf-8"))["digest"])
    except (ValueError, KeyError, TypeError):
        return "unreadable"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for the process that is at work there, if any."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            opened = (folder / _LOCK).open("a")
        except FileNotFoundError:  # whoever was at work there has removed the folder just now
            continue
        with opened as lock:
            _wait_for(lock, folder)
            # Whoever was waited for may have removed the folder, and the lock with it.
            if _is_at(lock, folder / _LOCK):
                yield
                return


def _wait_for(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        print(f"{folder}: another process is at work there; waiting for it.", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _is_at(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False
