"""Runs of studies: resumed, repeated where they failed, and ended with their study."""

import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from studying import plan_of

from lag_megatron.config import dump_config
from lag_megatron.errors import ConfigError
from lag_megatron.study import StudyFolder, launch_runs, prepare_study

FAKE = """
import json, signal, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run-dir") + 1])
run.mkdir(parents=True, exist_ok=True)
mode = Path(__file__).with_name("mode").read_text()
if mode == "wait":
    signal.signal(signal.SIGTERM, lambda *_: ((run / "saved").touch(), sys.exit(0)))
    (run / "ready").touch()
    time.sleep(60)
if mode == run.name:
    print("it broke here"); sys.exit(3)
with (run / "journal.jsonl").open("a") as file:
    file.write(json.dumps({"event": "run_finished"}) + "\\n")
"""


class Fake:
    """A study whose runs only write that they have finished, or fail, or wait to be ended."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.plan = plan_of(folder)
        self.folder = StudyFolder(folder / "out")
        self.script = folder / "fake.py"
        self.script.write_text(FAKE)
        (folder / "mode").write_text(mode)
        self.said: list[str] = []

    def run(self, workers: int = 2):
        left = prepare_study(self.plan, self.folder, workers=workers)
        return launch_runs(left, self.folder, script=self.script, launcher=(), workers=workers,
                       say=self.said.append)  # fmt: skip

    def started(self) -> list[str]:
        return [line.partition(":")[0] for line in self.said if line.endswith("started")]


def test_finished_runs_are_not_repeated_and_failed_ones_are(tmp_path: Path) -> None:
    study = Fake(tmp_path, "last-constant-s1")
    ended = study.run()
    assert study.started() == [run.name for run in study.plan.runs]
    assert [failure.run.name for failure in ended.failures] == ["last-constant-s1"]
    assert "exit code 3" in ended.failures[0].text
    assert "it broke here" in ended.failures[0].text
    written = (study.folder.root / "configs" / "lag-constant-s2.yaml").read_text()
    assert written == dump_config(study.plan.runs[3].config)

    again = Fake(tmp_path, "")
    assert again.run() == type(ended)(())
    assert again.started() == ["last-constant-s1"]
    assert Fake(tmp_path, "").run(1).failures == ()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_signal_reaches_the_runs_and_they_save(tmp_path: Path) -> None:
    study = Fake(tmp_path, "wait")
    ready = [study.folder.run(run).root / "ready" for run in study.plan.runs[:2]]

    def interrupt() -> None:
        wait_for(*ready)
        signal.raise_signal(signal.SIGINT)  # handled in the main thread

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    ended = study.run()
    thread.join()
    assert ended.signal == signal.SIGINT
    assert all(path.with_name("saved").exists() for path in ready)
    assert len(study.started()) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_no_run_stays_behind_when_the_terminal_is_gone(tmp_path: Path) -> None:
    study = Fake(tmp_path, "wait")
    first = study.folder.run(study.plan.runs[0]).root

    def say(text: str) -> None:
        if study.plan.runs[0].name not in text:
            wait_for(first / "ready")
            raise BrokenPipeError

    left = prepare_study(study.plan, study.folder, workers=2)
    with pytest.raises(BrokenPipeError):
        launch_runs(left, study.folder, script=study.script, launcher=(), workers=2, say=say)
    wait_for(first / "saved")
    assert (first / "saved").exists()


def test_a_launcher_that_cannot_work_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, launcher=["no_such_launcher", "{port}"])
    with pytest.raises(ConfigError, match="no_such_launcher"):
        prepare_study(plan, StudyFolder(tmp_path / "out"), workers=1)
    plan = plan_of(tmp_path, launcher=[sys.executable, "-u"])
    with pytest.raises(ConfigError, match="would meet at one port"):
        prepare_study(plan, StudyFolder(tmp_path / "out"), workers=2)
    assert not (tmp_path / "out").exists()
