"""The journal: what happened, written before anyone acts on it.

After a kill the coordinator's knowledge is the replay of this file.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from lag_megatron.errors import RunError

JournalEvent = dict[str, Any]


class Journal:
    """Events of a run, appended and flushed to disk one by one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events = _replay(path)

    @property
    def events(self) -> list[JournalEvent]:
        """All events, oldest first."""
        return list(self._events)

    def append(self, event: str, **fields: Any) -> None:
        """Write one event and wait until it is on disk.

        Raises:
            RunError: if that cannot be done; no part of the event stays.
        """
        entry = {"event": event, "time": time.time(), **fields}
        whole = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn last line is dropped when it is read
                os.truncate(self._path, whole)
            raise RunError(
                f"{self._path}: cannot be written: {error.strerror}. Mend that and run the same "
                "command again."
            ) from error
        self._events.append(entry)

    def find(self, event: str, **fields: Any) -> JournalEvent | None:
        """The last event of this kind whose fields have these values."""
        for entry in reversed(self._events):
            if entry["event"] == event and all(entry.get(k) == v for k, v in fields.items()):
                return entry
        return None


def _replay(path: Path) -> list[JournalEvent]:
    """Read all events; a torn last line is cut off the file, so that the next one starts clean."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole, _, torn = content.rpartition(b"\n")
    if torn:
        os.truncate(path, len(content) - len(torn))
    events = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            events.append(json.loads(line))
        except ValueError:
            raise RunError(
                f"{path}:{number}: not a journal line. The file was changed by something else; "
                "restore it or start a new run directory."
            ) from None
    return events
