"""The journal of a run: each event is on disk before anything that depends on it is done.

After a kill the coordinator's state is read again from this file.
"""

import json
import time
from pathlib import Path
from typing import Any

from lag_megatron.atomic_io import append_lines, cut_torn_line
from lag_megatron.errors import RunError
from lag_megatron.run.json_schema import require_schema
from lag_megatron.run.record_schema import MEMBERS_OF_EVENTS, JournalLine
from lag_megatron.small_files import read_json_lines

JournalEvent = dict[str, Any]
_ADVICE = "The file was changed by something else; restore it or start a new run directory."


class Journal:
    """Events of a run, appended and flushed to disk one by one.

    Args:
        path: of the file; a torn last line is cut off.
    """

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
        line = {"event": event, "time": time.time(), **fields}
        append_lines(self._path, json.dumps(line) + "\n", flush=True)
        self._events.append(line)

    def find(self, event: str, **fields: Any) -> JournalEvent | None:
        """The last event of this kind whose fields have these values."""
        for line in reversed(self._events):
            if line["event"] == event and all(line.get(k) == v for k, v in fields.items()):
                return line
        return None


def _replay(path: Path) -> list[JournalEvent]:
    """Read all events; a torn last line is cut off the file, so that the next one starts clean."""
    if not path.exists():
        return []
    cut_torn_line(path)
    return read_journal(path)


def read_journal(path: Path) -> list[JournalEvent]:
    """All events of a journal, oldest first; none if there is no such file.

    Raises:
        RunError: naming the first line that is no event, or lacks what its event has.
    """
    return read_json_lines(
        path, what="a run's journal", error=RunError, advice=_ADVICE, check=_require_event
    )


def _require_event(line: JournalEvent, where: str) -> None:
    what = "a line of a run's journal"
    require_schema(line, JournalLine, where=where, what=what, error=RunError, advice=_ADVICE)
    for name in MEMBERS_OF_EVENTS.get(line["event"], ()):
        if name not in line:
            raise RunError(
                f"{where}: expected the event {line['event']}, but {name} is missing. {_ADVICE}"
            )
