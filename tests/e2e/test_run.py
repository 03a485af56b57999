"""The main job from end to end under the real launcher, disturbed and undisturbed."""

import json
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from launcher import finish, kill_all, ranks_of, run, start, start_in_group, wait_for


def decision_of(run_dir):
    """``decision.json`` without the numbers that no two runs share, the seconds it took."""
    decision = json.loads((run_dir / "growth01" / "decision.json").read_text())
    for name in ("seconds", "coordinator_seconds"):
        del decision["cost"][name]
    return decision


def rows_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("train/tokens_per_second", None)
    return rows


def events_of(run_dir, name):
    path = run_dir / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == name]


# Two probe groups that advance in three rungs, and are disturbed at most moments.
SEARCH = [
    *("--set", "growth.rule=halving", "--set", "growth.lag=8", "--set", "growth.rungs=[2, 5, 8]"),
    *("--set", "growth.probe_groups=2"),
]


@pytest.fixture
def undisturbed(tiny, tmp_path):
    run_dir = tmp_path / "undisturbed"
    output = run(tiny, run_dir)
    return run_dir, output


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0


def disturb(config, run_dir, options, moments, *, kills):
    """Start and kill a run, each time some events after its start; returns how often it died."""
    journal = run_dir / "journal.jsonl"
    for kill in range(kills):
        process = start(config, run_dir, *options)
        wanted = lines_of(journal) + moments.randint(1, 12)
        while process.poll() is None and lines_of(journal) < wanted:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        if process.poll() is not None:
            return kill
        kill_all(process)
    return kills


def test_killed_runs_end_like_the_undisturbed_one(tiny, tmp_path):
    reference, run_dir = tmp_path / "undisturbed", tmp_path / "killed"
    output = run(tiny, reference, *SEARCH)
    assert "decision: " in output
    assert f"report: {reference / 'report.html'}" in output
    seed = random.SystemRandom().randrange(10**6)
    print("seed of the moments:", seed)
    assert disturb(tiny, run_dir, SEARCH, random.Random(seed), kills=3)
    run(tiny, run_dir, *SEARCH)

    assert decision_of(run_dir) == decision_of(reference)
    assert rows_of(run_dir) == rows_of(reference)
    last = [events_of(d, "run_finished")[-1]["val_loss"] for d in (run_dir, reference)]
    assert last[0] == last[1]
    for kind in ("probe_finished", "probe_stopped"):
        named = sorted(event["id"] for event in events_of(run_dir, kind))
        assert named == sorted(event["id"] for event in events_of(reference, kind))


def test_the_run_directory_is_what_the_contract_says(undisturbed, tiny):
    run_dir, _ = undisturbed
    decision = decision_of(run_dir)
    pool = json.loads((run_dir / "growth01" / "pool.json").read_text())
    assert [c["id"] for c in decision["candidates"]] == [c["id"] for c in pool]
    losses = {c["id"]: dict(c["curve"])[3] for c in decision["candidates"]}
    assert decision["chosen"] == min(losses, key=losses.get)
    assert decision["cost"]["probe_steps"] == len(pool) * 3
    rows = rows_of(run_dir)
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 21))
    validated = {r["step"]: r["val/loss"] for r in rows if "val/loss" in r}
    assert {0, 10, 20} <= set(validated)
    assert validated[13] == losses[decision["chosen"]]
    assert (run_dir / "stage00" / "latest").read_text() == "step00000010"
    assert (run_dir / "stage01" / "latest").read_text() == "step00000020"
    states = [p for p in (run_dir / "growth01").glob("*/step*") if p.is_dir()]
    assert [p.parent.name for p in states] == [decision["chosen"]]
    assert (run_dir / "report.html").is_file()

    again = run(tiny, run_dir)
    assert "this run has finished" in again
    assert len(events_of(run_dir, "run_started")) == 1


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends_cleanly(number, tiny, tmp_path):
    run_dir = tmp_path / "signalled"
    process = start(tiny, run_dir, "--set", "stages=[{steps: 4000}]")
    wait_for(run_dir / "metrics.jsonl", '"step": 12,', process)
    for rank in ranks_of(process):
        rank.send_signal(number)
    assert finish(process) == 0
    assert f"stopped (received {number.name})" in Path(f"{run_dir}.log").read_text()
    assert not events_of(run_dir, "run_finished")
    saved = (run_dir / "stage00" / "latest").read_text()
    assert int(saved.removeprefix("step")) >= 12
    assert int(saved.removeprefix("step")) == rows_of(run_dir)[-1]["step"]


@pytest.mark.parametrize(
    "launcher",
    ["python", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepspeed", "torchrun"))],
)
def test_ctrl_c_saves_and_ends(launcher, tiny, tmp_path):
    run_dir = tmp_path / "interrupted"
    process = start_in_group(launcher, tiny, run_dir, "--set", "stages=[{steps: 4000}]")
    wait_for(run_dir / "metrics.jsonl", '"step": 12,', process)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    code = finish(process)
    assert launcher != "python" or code == 0  # of the launchers each has a code of its own
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    log = Path(f"{run_dir}.log").read_text()
    assert "interrupted: the run saves and ends." in log
    assert "stopped (received SIGINT)" in log
    saved = (run_dir / "stage00" / "latest").read_text()
    assert int(saved.removeprefix("step")) == rows_of(run_dir)[-1]["step"] >= 12
    process.wait(60)


def test_ranks_end_when_their_launcher_is_gone(tiny, tmp_path):
    run_dir = tmp_path / "orphaned"
    process = start(tiny, run_dir, "--set", "stages=[{steps: 4000}]")
    wait_for(run_dir / "metrics.jsonl", '"step": 6,', process)
    ranks = ranks_of(process)
    launchers = [p for p in psutil.Process(process.pid).children(recursive=True) if p not in ranks]
    for launcher in [*launchers, psutil.Process(process.pid)]:
        launcher.kill()
    process.wait(10)
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert "stopped (" in Path(f"{run_dir}.log").read_text()
    assert (run_dir / "stage00" / "latest").is_file()


@pytest.mark.slow  # it waits out the lock's patience
def test_a_second_writer_is_refused(tiny, tmp_path):
    run_dir = tmp_path / "shared"
    first = start(tiny, run_dir, "--set", "stages=[{steps: 4000}]")
    wait_for(run_dir / "metrics.jsonl", '"step": 2,', first)
    second = start(tiny, run_dir, "--set", "stages=[{steps: 4000}]")
    assert finish(second) == 2
    kill_all(first)
    log = Path(f"{run_dir}.log").read_text()
    assert "lock: the run is being written by " in log
    assert "Traceback" not in log
