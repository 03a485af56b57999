"""W&B offline, with the real package: what it wrote is read back; what fails, and what is slow."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb
from conftest import ROOT
from PIL import Image
from read_wandb import fragments

from lag_megatron.config import TrackingConfig
from lag_megatron.config.schema.run import WandbConfig
from lag_megatron.run import wandb_logger
from lag_megatron.run.metrics import Console
from lag_megatron.run.wandb_logger import Wandb

COLUMNS = ["candidate", "layer map", "loss at 0", "loss at 2", "rank", "status", "chosen"]
CANDIDATES = [
    ["i2-b1", "0 1 2 2", 5.0, 3.0, 1, "finished", True],
    ["i1-b2", "0 1 0 1", 4.5, None, None, "stopped", False],
]
CURVES = {"i2-b1": [(0, 5.0), (2, 3.0)], "i1-b2": [(0, 4.5)]}


def train_row(step, stage):
    return {"step": step, "tokens": 100 * step, "stage": stage, "train/loss": 9.0 - step}


@pytest.fixture(scope="module", autouse=True)
def a_home_of_its_own(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("WANDB_")] + ["NETRC"]:
            patch.delenv(name, raising=False)
        for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(home))
        yield home


def start_logger(folder, mode="auto"):
    tracking = TrackingConfig(wandb=WandbConfig(mode=mode))
    config = {"model": {"num_layers": 2}, "stages": [{"steps": 5}]}
    return Wandb(tracking, folder=folder, config=config, console=Console())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run in two starts: a stage, killed after step 5; two steps again, probes, a growth."""
    folder = tmp_path_factory.mktemp("runs") / "tiny run"
    folder.mkdir()
    for name in ("pool.json", "decision.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    Image.new("RGB", (6, 4), "red").save(folder / "heat.png")
    first = start_logger(folder)
    for step in range(1, 6):
        first.log(train_row(step, stage=0))
    first.log({"step": 5, "tokens": 500, "stage": 0, "val/loss": 4.0})
    first.finish(exit_code=0)
    ids = json.loads((folder / "wandb_ids.json").read_text())
    second = start_logger(folder)
    second.summary({"early": 1})
    for step in (4, 5, 6, 5):  # the last one W&B would refuse, with a warning of its own
        second.log(train_row(step, stage=0))
    for rung in ((0, 1), (2,)):
        for name, losses in CURVES.items():
            rows = [
                {"step": step, "tokens": 600 + 100 * step, "val/loss": loss}
                for step, loss in losses
                if step in rung
            ]
            if rows:
                second.probe(1, name, rows, summary={"rank": len(rows), "status": "finished"})
    second.event(
        1,
        columns=COLUMNS,
        rows=CANDIDATES,
        curves=CURVES,
        images=lambda: {"heat_map": folder / "heat.png"},
        files=[folder / "pool.json", folder / "decision.json"],
        summary={"growth01/chosen": "i2-b1"},
    )
    second.log(train_row(7, stage=1))
    second.log({"step": 8, "tokens": 800, "stage": 1, "val/loss": float("nan")})
    second.finish(exit_code=1)
    wandb.teardown()  # W&B's own process writes after finish() has returned
    assert json.loads((folder / "wandb_ids.json").read_text()).items() > ids.items()
    return folder


RUNS = {
    "stage00": ("stage", 2),
    "stage01": ("stage", 1),
    "growth01/i2-b1": ("probe", 2),
    "growth01/i1-b2": ("probe", 1),
}


@pytest.mark.parametrize("key", RUNS)
def test_each_stage_and_probe_is_a_run_of_one_group(written, key):
    job_type, starts = RUNS[key]
    found = fragments(written, key)
    assert len(found) == starts  # a resumed one has the same id
    for fragment in found:
        run = fragment.run
        assert (run.job_type, run.run_group, run.project) == (job_type, "tiny run", "lag-megatron")
        assert run.display_name == f"tiny run-{key.replace('/', '-')}"
        assert fragment.config["model"] == {"num_layers": 2}
        assert fragment.axes == {"tokens": "", "train/*": "tokens", "val/*": "tokens"}


def test_there_are_no_other_runs(written):
    assert set(json.loads((written / "wandb_ids.json").read_text())) == set(RUNS)


def test_rows_of_a_stage(written):
    first, second = fragments(written, "stage00")
    assert [row["_step"] for row in first.history] == [1, 2, 3, 4, 5]
    assert first.history[-1]["val/loss"] == 4.0
    assert first.history[-1]["train/loss"] == 4.0
    assert [row["tokens"] for row in second.history] == [400, 500, 600]
    assert second.config["stage"] == 0
    assert second.summary["early"] == 1
    (third,) = fragments(written, "stage01")
    assert [row["_step"] for row in third.history] == [0, 7, 8]
    assert [f.exit_code for f in (first, second, third)] == [0, 0, 1]


def test_rows_of_a_probe_count_from_growth(written):
    rows = [row for f in fragments(written, "growth01/i2-b1") for row in f.history]
    keys = ("_step", "probe/step", "tokens", "val/loss")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (0, 0, 600, 5.0),
        (2, 2, 800, 3.0),
    ]
    (other,) = fragments(written, "growth01/i1-b2")
    assert other.config["probe"] == {"growth": 1, "candidate": "i1-b2"}
    assert other.summary["status"] == "finished"
    assert other.exit_code == 0


def media(fragment, key):
    row = next(row for row in fragment.history if f"{key}.path" in row)
    return fragment.folder / "files" / row[f"{key}.path"]


def test_a_growth_event_is_a_table_a_chart_and_pictures(written):
    (stage,) = fragments(written, "stage01")
    table = json.loads(media(stage, "growth01/candidates").read_text())
    assert (table["columns"], table["data"]) == (COLUMNS, CANDIDATES)
    lines = json.loads(media(stage, "growth01/curves_table").read_text())["data"]
    assert {name: [(x, y) for x, n, y in lines if n == name] for name in CURVES} == CURVES
    with Image.open(media(stage, "growth01/heat_map")) as picture:
        assert picture.size == (6, 4)
    assert stage.summary["growth01/chosen"] == "i2-b1"


def test_plan_and_decision_are_an_artifact(written):
    (stage,) = fragments(written, "stage01")
    artifact = next(a for a in stage.artifacts if a.type == "growth")
    assert artifact.name == "tiny_run-growth01"
    kept = {Path(c.path).name: Path(c.local_path) for c in artifact.manifest.contents}
    assert {name: json.loads(path.read_text())["name"] for name, path in kept.items()} == {
        name: name for name in ("pool.json", "decision.json")
    }


def test_an_exception_in_training_loses_no_row(tmp_path):
    tests = ROOT / "tests"
    folders = [str(p) for p in (Path(__file__).parent, tests, tests / "support", ROOT)]
    code = f"""
import sys, time
sys.path[:0] = {folders}
from pathlib import Path
from test_wandb_logger import start_logger, train_row
run = start_logger(Path({str(tmp_path)!r}))
run.log(train_row(1, stage=0))
while not list(Path({str(tmp_path)!r}).glob("wandb/offline-run-*")):
    time.sleep(0.01)
run.log(train_row(2, stage=0))
raise RuntimeError("training failed")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "training failed" in result.stderr
    assert "W&B" not in result.stderr
    (fragment,) = fragments(tmp_path, "stage00")
    assert [row["_step"] for row in fragment.history] == [1, 2]
    assert fragment.exit_code == 1


def wandb_warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]


def wait_for_the_worker():
    for thread in threading.enumerate():
        if thread.name == "wandb-logger":
            thread.join(10)
            assert not thread.is_alive()


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


class FakeRun:
    """Enough of a W&B run for what must not reach the real one."""

    step = 0

    def __init__(self, **methods):
        self.summary = {}
        self.log = self.define_metric = self.finish = lambda *_, **__: None
        self.__dict__.update(methods)


ERRORS = {
    "setup": OSError("no space left"),
    "init": wandb.errors.CommError("no network"),
    "log": KeyError("of a kind that nobody foresaw"),
    "finish": SystemExit("from within W&B"),
}


@pytest.mark.parametrize("where", ERRORS)
def test_a_failure_is_told_once_and_stops_nothing(where, tmp_path, monkeypatch, capsys):
    fail = failing(ERRORS[where])
    run = FakeRun(**({where: fail} if where in ("log", "finish") else {}))
    monkeypatch.setattr(wandb, "setup", fail if where == "setup" else lambda *_: None)
    monkeypatch.setattr(wandb, "init", fail if where == "init" else lambda **_: run)
    broken = start_logger(tmp_path)
    broken.log(train_row(1, stage=0))
    broken.log(train_row(2, stage=1))
    wait_for_the_worker()
    broken.log(train_row(3, stage=1))
    broken.summary({"a": 1})
    broken.probe(1, "a", [{"step": 0}])
    broken.finish(exit_code=0)
    (line,) = wandb_warnings(capsys)
    assert line.startswith("W&B failed and is off for this run, which goes on: ")
    assert type(ERRORS[where]).__name__ in line
    assert str(ERRORS[where]) in line


def test_a_lost_run_directory_is_told_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "setup", lambda *_: None)
    lost = start_logger(tmp_path / "gone")
    lost.log(train_row(1, stage=0))
    lost.finish(exit_code=0)
    (line,) = wandb_warnings(capsys)
    assert "No such file or directory" in line
    assert str(tmp_path / "gone") in line


def test_a_slow_upload_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    slow = FakeRun(finish=failing(TimeoutError()), name="x", dir=str(tmp_path / "wandb/r/files"))
    monkeypatch.setattr(wandb, "setup", lambda *_: None)
    monkeypatch.setattr(wandb, "init", lambda **_: slow)
    run = start_logger(tmp_path)
    run.log(train_row(1, stage=0))
    run.finish(exit_code=0)
    (line,) = wandb_warnings(capsys)
    assert line.endswith(f"wandb sync {tmp_path}/wandb/r")


@pytest.fixture
def stuck(monkeypatch):
    """A W&B whose start does not return."""
    release = threading.Event()
    monkeypatch.setattr(wandb, "setup", lambda *_: None)
    monkeypatch.setattr(wandb, "init", lambda **_: release.wait(30) and FakeRun())
    yield release
    release.set()
    wait_for_the_worker()


def test_training_does_not_wait_for_wandb(stuck, tmp_path, capsys):
    run = start_logger(tmp_path)
    run.log(train_row(1, stage=0))
    started = time.perf_counter()
    for step in range(2, 102):
        run.log(train_row(step, stage=0))
    assert time.perf_counter() - started < 0.5  # 5 ms a row, on a loaded machine too
    run.finish(exit_code=0, timeout=0.2)
    assert time.perf_counter() - started < 5
    (line,) = wandb_warnings(capsys)
    assert "not all of it was written within 0 s" in line


def test_what_waits_is_bounded(stuck, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_logger, "_QUEUE_LIMIT", 3)
    run = start_logger(tmp_path)
    for step in range(6):
        run.log(train_row(step, stage=0))
    (line,) = wandb_warnings(capsys)
    assert "does not keep up" in line


@pytest.mark.parametrize("by", ["config", "environment"])
def test_disabled_starts_nothing(by, tmp_path, monkeypatch, capsys):
    if by == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    before = set(threading.enumerate())
    run = start_logger(tmp_path, "disabled" if by == "config" else "auto")
    run.log(train_row(1, stage=0))
    run.summary({"a": 1})
    run.finish(exit_code=0)
    assert set(threading.enumerate()) == before
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_an_unknown_mode_is_one_line_with_the_variable(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    run = start_logger(tmp_path)
    run.log(train_row(1, stage=0))
    run.finish(exit_code=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert "variable WANDB_MODE is 'ofline', expected one of online, offline" in line
    assert list(tmp_path.iterdir()) == []


def test_without_a_key_it_is_offline_and_says_how_to_sync(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my run"
    start_logger(folder)
    said = capsys.readouterr().out
    assert said.startswith("W&B is offline (no API key). ")
    assert said.endswith(f"wandb sync '{folder}/wandb'/offline-*\n")
    start_logger(folder, "offline")
    assert capsys.readouterr().out.startswith("W&B is offline. ")


def test_with_a_key_it_is_online(tmp_path, monkeypatch, capsys):
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    start_logger(tmp_path)
    assert "offline" in capsys.readouterr().out  # the key is another server's
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    start_logger(tmp_path)
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    start_logger(tmp_path)
    assert capsys.readouterr().out == ""
