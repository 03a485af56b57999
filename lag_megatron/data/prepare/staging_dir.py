"""Staging folders: one process writes, a killed one is resumed, a complete one is renamed."""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lag_megatron.atomic_io import flush_to_disk
from lag_megatron.errors import DataError
from lag_megatron.small_files import read_json
from lag_megatron.targets.file_lock import lock_file

_MARKER = "draft.json"
_LOCK = "lock"
_UNMARKED = "draft.part"


@contextlib.contextmanager
def exclusive(folder: Path, *, digest: str, complete: Path | None = None) -> Iterator[Path]:
    """Lock a folder for writing; an interrupted one is resumed by the next call with its digest.

    Args:
        folder: made if it is not there.
        digest: of the result; a folder that was started for another one is an error.
        complete: a file that exists once the folder is complete; another process may have written
            it before this one got the lock, so the caller checks it again.

    Raises:
        DataError: if the folder holds other files, or was started with another digest.
    """
    _require_own(folder, complete)  # before the lock file is created in it
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
    """Remove the marker and the lock of a folder that is complete."""
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

    Its marker and lock are removed last, so that its files are always marked as its own.
    """
    last = (_MARKER, _LOCK)
    for path in (folder / name for name in (*(_names(folder) - set(last)), *last)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            # Another process may be removing the same file.
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _require_own(folder: Path, complete: Path | None) -> None:
    names = _names(folder)
    # Another process may be writing.  It removes the marker after all other files, so the names are
    # listed once; it writes ``complete`` before it removes the marker, so that is checked second.
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
    elif (found := _digest_of(marker)) != digest:
        raise DataError(
            f"{folder}: half-written, from other text or settings ({found} then, {digest} now). "
            "Start what was begun there again, or delete the folder."
        )


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _digest_of(marker: Path) -> str:
    found = read_json(
        marker,
        what="what the unfinished data beside it is made from",
        error=DataError,
        advice="Delete the folder and prepare the text again.",
    )
    return str(found.get("digest"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for the process that has the lock, if any."""
    lock: IO[str] | None = None
    while lock is None:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process just removed the folder
            lock = lock_file(
                folder / _LOCK,
                timeout=math.inf,
                refusal=str,
                poll_seconds=0.1,
                waiting=lambda: _tell_waiting(folder),
            )
    with lock:
        yield


def _tell_waiting(folder: Path) -> None:
    print(f"{folder}: another process is at work there; waiting for it.", file=sys.stderr)
