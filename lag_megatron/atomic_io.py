"""Small files that survive kills, power cuts and full disks."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lag_megatron.errors import RunError, write_failure


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file so that a reader sees the old content or the new one, never a part."""
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):  # a read-only file system has none
            draft.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """As :func:`write_atomically`, for files of a run and files that a user has named.

    Raises:
        RunError: if that cannot be done; an old file stays as it was.
    """
    with _refusal(path):
        write_atomically(path, content)


def append_lines(path: Path, text: str, *, flush: bool = False) -> None:
    """Add lines to a file, all of them or none.

    Args:
        path: of the file.
        text: lines, each with its end.
        flush: wait until they are on disk.

    Raises:
        RunError: if that cannot be done; the file stays as it was.
    """
    with _refusal(path):
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                if flush:
                    os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # a torn last line is dropped when it is read
                os.truncate(path, size)
            raise


def cut_torn_line(path: Path) -> None:
    """Remove a last line that a kill has cut short, so that the next one starts clean.

    Raises:
        RunError: if the file cannot be changed.
    """
    content = path.read_bytes()
    torn = len(content) - content.rfind(b"\n") - 1
    if torn:
        with _refusal(path):
            os.truncate(path, len(content) - torn)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _refusal(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason, advice = write_failure(error)
        raise RunError(f"{path}: cannot be written: {reason} {advice}") from None
