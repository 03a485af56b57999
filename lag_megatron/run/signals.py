"""When a run is asked to end: signals of a scheduler, and launchers that died.

A signalled rank only sets a flag; all ranks agree on it at the next step and save together.
"""

import itertools
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PROGRAMS = frozenset({"deepspeed", "torchrun"})
_MODULES = ("deepspeed.launcher", "torch.distributed")
_GRACE_SECONDS = 20.0
_POLL_SECONDS = 0.5


class Stopped(Exception):
    """The run was asked to stop; what it needs to go on is on disk."""


class StopFlag:
    """Set by SIGTERM, by SIGUSR1, and when the launcher is gone."""

    def __init__(self) -> None:
        self.asked = False
        self.reason = ""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(_launchers(),), daemon=True).start()

    @property
    def why(self) -> str:
        """Why the run ends, as far as this rank knows."""
        return self.reason or "another rank was asked to stop"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask(f"received {signal.Signals(number).name}")

    def ask(self, reason: str) -> None:
        """Let this process save and end at its next step; later reasons are ignored."""
        if not self.asked:
            self.asked, self.reason = True, reason

    def _watch(self, launchers: dict[int, str]) -> None:
        """End this rank when its launcher is killed, which leaves its ranks running."""
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        while (launchers or os.getppid() > 1 or not launched) and all(
            _start_time(pid) == started for pid, started in launchers.items()
        ):
            time.sleep(_POLL_SECONDS)
        self.ask("the launcher is gone")
        time.sleep(_GRACE_SECONDS)
        os._exit(1)  # blocked in a collective whose other side has ended


def _launchers() -> dict[int, str]:
    """Parent processes that belong to a launcher, with their start times."""
    found: dict[int, str] = {}
    pid = os.getppid()
    while pid > 1 and _is_launcher(pid):
        found[pid] = _start_time(pid)
        pid = _parent(pid)
    return found


def _is_launcher(pid: int) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    programs = {Path(argument).name for argument in arguments[:2]}
    modules = {after for before, after in itertools.pairwise(arguments) if before == "-m"}
    return bool(programs & _PROGRAMS) or any(name.startswith(_MODULES) for name in modules)


def _parent(pid: int) -> int:
    return int(_stat(pid)[1]) if _stat(pid) else 0


def _start_time(pid: int) -> str:
    """A process's start time in clock ticks; empty once it is gone."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()
