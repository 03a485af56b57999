"""Launching the runs of a study as subprocesses, several at a time."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lag_megatron.atomic_io import write_file
from lag_megatron.config import dump_config
from lag_megatron.errors import ConfigError, RunError
from lag_megatron.run.directory import RunDirectory, claim
from lag_megatron.run.journal import read_journal
from lag_megatron.study.plan import PlannedRun, StudyPlan

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 60.0
_LAST_LINES = 20


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Paths of a study's output; ``root`` is absolute."""

    root: Path

    def run(self, run: PlannedRun) -> RunDirectory:
        """Where a run is kept."""
        return RunDirectory(self.root / "runs" / run.name)

    def config(self, run: PlannedRun) -> Path:
        """The configuration that is launched."""
        return self.root / "configs" / f"{run.name}.yaml"

    def log(self, run: PlannedRun) -> Path:
        """What a run has printed, all starts together."""
        return self.root / "logs" / f"{run.name}.log"

    def finished(self, run: PlannedRun) -> bool:
        """Whether the run's journal has the event ``run_finished``; exit codes are not used."""
        journal = read_journal(self.run(run).journal)
        return any(line.get("event") == "run_finished" for line in journal)


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that did not finish, and the end of what it printed."""

    run: PlannedRun
    text: str


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """How a study's processes ended; ``signal`` is the number of the one that ended them."""

    failures: tuple[Failure, ...]
    signal: int | None = None


@dataclass(slots=True)
class _Child:
    run: PlannedRun
    process: "subprocess.Popen[bytes]"
    slot: int
    started: float = field(default_factory=time.monotonic)


def prepare_study(plan: StudyPlan, folder: StudyFolder, *, workers: int) -> list[PlannedRun]:
    """Write the configurations, and return the runs that have not finished.

    Raises:
        ConfigError: if the launcher is not there, or cannot start runs side by side.
        RunError: if a run directory there belongs to a run with other settings.
    """
    _require_launcher(plan.study.config.launcher, workers=workers)
    for run in plan.runs:
        if (folder.run(run).root / "config.yaml").exists():
            _require_same(folder, run)
    for path in ("configs", "logs", "runs"):
        (folder.root / path).mkdir(parents=True, exist_ok=True)
    for run in plan.runs:
        write_file(folder.config(run), dump_config(run.config))
    return [run for run in plan.runs if not folder.finished(run)]


def _require_same(folder: StudyFolder, run: PlannedRun) -> None:
    try:
        claim(folder.run(run), run.config)
    except RunError as error:
        raise RunError(f"{run.name}: {error} For a changed study, give another --out.") from None


def launch_runs(
    runs: Sequence[PlannedRun],
    folder: StudyFolder,
    *,
    script: Path,
    launcher: Sequence[str],
    workers: int,
    say: Callable[[str], None],
) -> LaunchResult:
    """Start the runs, ``workers`` at a time, and wait for all of them.

    SIGINT and SIGTERM are passed on: runs save, end, and go on with the next call.  A second
    signal, or a minute, kills them.

    Args:
        script: ``launch/train.py``.
        say: prints one line of progress.
    """
    waiting, free = deque(runs), deque(range(workers))
    active: list[_Child] = []
    failures: list[Failure] = []
    with _signals() as received:
        try:
            while (waiting or active) and not received:
                while waiting and free:
                    run, slot = waiting.popleft(), free.popleft()
                    say(f"{run.name}: started")
                    command = _command(run, folder, script, launcher, slot=slot)
                    active.append(_Child(run, _start(command, folder.log(run), workers), slot))
                for child in [c for c in active if c.process.poll() is not None]:
                    active.remove(child)
                    free.append(child.slot)
                    failures += _ended(child, folder, say)
                time.sleep(_POLL_SECONDS)
        finally:
            _stop(active, received, say)
    return LaunchResult(tuple(failures), received[0] if received else None)


def _ended(child: _Child, folder: StudyFolder, say: Callable[[str], None]) -> Iterator[Failure]:
    seconds, run = time.monotonic() - child.started, child.run
    if folder.finished(run):
        say(f"{run.name}: finished in {seconds:,.0f} s")
        return
    code = child.process.returncode
    lines = folder.log(run).read_text(encoding="utf-8", errors="replace").splitlines()
    end = "\n".join(f"  {line}" for line in lines[-_LAST_LINES:])
    text = f"{run.name}: did not finish (exit code {code}). The end of {folder.log(run)}:\n{end}"
    say(text)
    yield Failure(run, text)


def _require_launcher(launcher: Sequence[str], *, workers: int) -> None:
    if not launcher:
        return
    if shutil.which(launcher[0], path=_path()) is None:
        raise ConfigError(f"launcher: {launcher[0]!r} is not a program on the PATH.")
    if workers > 1 and not any("{port}" in word for word in launcher):
        raise ConfigError(
            f"launcher: {workers} runs at a time would meet at one port. Let each have its own, "
            'e.g. [deepspeed, --num_gpus, "1", --master_port, "{port}"], or take --workers 1.'
        )


def _command(
    run: PlannedRun, folder: StudyFolder, script: Path, launcher: Sequence[str], *, slot: int
) -> list[str]:
    values = {"{port}": str(_free_port()), "{slot}": str(slot)}
    words = list(launcher) or [sys.executable]
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    words[0] = str(shutil.which(words[0], path=_path()))
    run_dir = str(folder.run(run).root)
    return [*words, str(script), "--config", str(folder.config(run)), "--run-dir", run_dir]


def _start(command: Sequence[str], log: Path, workers: int) -> "subprocess.Popen[bytes]":
    """Start a run in a session of its own: Ctrl-C reaches it as a SIGTERM from this process."""
    # A module that is started as a file must not put its folder in front of the import path.
    environment = {**os.environ, "PATH": _path(), "PYTHONSAFEPATH": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _path() -> str:
    """Programs beside this Python come first: a launcher is installed with it."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the numbers of received signals instead of their default actions."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(active: Sequence[_Child], received: list[int], say: Callable[[str], None]) -> None:
    """End the runs that are active; a launcher and its ranks are one process group."""
    if not active:
        return
    _signal_all(active, signal.SIGTERM)  # before printing to a terminal that may be closed
    say(f"ending {', '.join(child.run.name for child in active)} ...")
    deadline, signals = time.monotonic() + _GRACE_SECONDS, len(received)
    while time.monotonic() < deadline and len(received) <= signals:
        if not any(_alive(child) for child in active):
            return
        time.sleep(_POLL_SECONDS)
    _signal_all(active, signal.SIGKILL)
    for child in active:
        child.process.wait()


def _signal_all(active: Sequence[_Child], number: int) -> None:
    for child in active:
        with suppress(ProcessLookupError):
            os.killpg(child.process.pid, number)


def _alive(child: _Child) -> bool:
    """Whether the process or any that it started is there; a launcher may end before its ranks."""
    child.process.poll()
    try:
        os.killpg(child.process.pid, 0)
    except ProcessLookupError:
        return False
    return True
