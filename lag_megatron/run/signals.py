"""When a run is asked to end: signals of a scheduler, and launchers that died.

A signalled rank only sets a flag; all ranks agree on it at the next step and save together.
Signals are obeyed in a thread of their own: the main thread may be waiting in a collective call.
"""

import contextlib
import itertools
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PROGRAMS = frozenset({"deepspeed", "torchrun"})
_MODULES = ("deepspeed.launcher", "torch.distributed")
_GRACE_SECONDS = 30.0  # as DeepSpeed's launcher and torchrun leave to their ranks
_ONE_KEY_SECONDS = 1.0  # the terminal and a launcher may each send the SIGINT of one Ctrl-C
_INTERRUPTED = 128 + signal.SIGINT
_POLL_SECONDS = 0.5


_STDERR = 2
_ENDING = b"interrupted: the run saves and ends. Ctrl-C again leaves at once, without saving.\n"
_LEFT_AT_ONCE = (
    b"interrupted again: left at once. The steps since the last checkpoint are lost; the same "
    b"command goes on from there.\n"
)


class Stopped(Exception):
    """The run was asked to stop; what it needs to go on is on disk."""


class StopFlag:
    """Set by SIGINT (Ctrl-C), SIGTERM, SIGUSR1, and when the launcher is gone.

    A second SIGINT, more than a second after the first, ends the process at once with code 130.
    """

    def __init__(self) -> None:
        self.asked = False
        self.reason = ""
        self._interrupted: float | None = None  # when the first SIGINT came
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A forked child has the pipe too, and its signals are not this process's.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        for number in _SIGNALS:
            signal.signal(number, _ignore)
        threading.Thread(target=self._obey, args=(reader,), daemon=True, name="signals").start()
        threading.Thread(target=self._watch, args=(_launchers(),), daemon=True).start()

    @property
    def why(self) -> str:
        """Why the run ends, as far as this rank knows."""
        return self.reason or "another rank was asked to stop"

    def _obey(self, reader: int) -> None:
        """Do what each signal asks for; its number is a byte that Python writes to the pipe."""
        while numbers := os.read(reader, 1):
            if numbers[0] in _SIGNALS:
                self._on_signal(signal.Signals(numbers[0]))

    def _on_signal(self, number: signal.Signals) -> None:
        self.ask(f"received {number.name}")
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            _say(_ENDING)
        elif now > self._interrupted + _ONE_KEY_SECONDS:
            _say(_LEFT_AT_ONCE)
            os._exit(_INTERRUPTED)

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


def _say(line: bytes) -> None:
    """Write a line on rank 0; without Python's streams, on which the main thread may be waiting."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(_STDERR, line)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Let Python write the signal's number to the pipe, and do nothing else."""


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
