"""Searches by ask and tell in processes that are killed, and in several at a time."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
from asking import begin, candidates, decision_of, journal_of, make_base, states_in, work
from conftest import ROOT

PROGRAM = ROOT / "tests" / "support" / "asking.py"
PLACES = ("asked", "step", "trained", "saved", "recorded", "fsync")


def start(directory, base, worker, *kill):
    command = [sys.executable, PROGRAM, directory, base, worker, *kill]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, env=environment)


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


@pytest.fixture
def undisturbed(base, tmp_path):
    work(begin(tmp_path / "undisturbed", base))
    return tmp_path / "undisturbed"


def same(directory, undisturbed):
    assert decision_of(directory) == decision_of(undisturbed)
    assert states_in(directory) == states_in(undisturbed)
    for path in undisturbed.glob("growth01/*/probe.jsonl"):
        rows = (directory / path.relative_to(undisturbed)).read_text()
        assert sorted(map(json.loads, rows.splitlines()), key=lambda row: row["step"]) == [
            json.loads(line) for line in path.read_text().splitlines()
        ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_kill_9_between_and_within_ask_and_tell(seed, base, undisturbed, tmp_path):
    moments, killed = random.Random(seed), []
    for place in (*PLACES, *PLACES):
        count = moments.randint(1, 60 if place == "fsync" else 6)
        process = start(tmp_path / "killed", base, 0, place, count)
        assert process.wait(120) in (0, -9)
        killed.append(process.returncode == -9)
    assert sum(killed) > len(PLACES)
    assert start(tmp_path / "killed", base, 0).wait(120) == 0
    same(tmp_path / "killed", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_share_a_directory_and_one_is_killed(base, undisturbed, tmp_path):
    directory = tmp_path / "shared"
    workers = [start(directory, base, 0), start(directory, base, 1, "saved", 3)]
    assert workers[1].wait(120) == -9
    again = start(directory, base, 1)
    assert [process.wait(120) for process in (workers[0], again)] == [0, 0]
    same(directory, undisturbed)
    started = [e["group"] for e in journal_of(directory) if e["event"] == "probe_started"]
    assert set(started) == {0, 1}


def test_two_processes_share_a_directory(base, undisturbed, tmp_path):
    """The second one waits for what the first one trains, and both end with the decision."""
    directory = tmp_path / "shared"
    workers = [start(directory, base, worker) for worker in (0, 1)]
    assert [process.wait(120) for process in workers] == [0, 0]
    same(directory, undisturbed)
    trained = [e["id"] for e in journal_of(directory) if "rung" in e and "seconds" in e]
    assert len(trained) == len(
        [e["id"] for e in journal_of(undisturbed) if "rung" in e and "seconds" in e]
    )


def test_a_worker_waits_while_others_train_what_is_left(base, tmp_path):
    search = begin(tmp_path / "search", base)
    trials = [search.ask(worker=worker) for worker in range(len(candidates()))]
    other = start(tmp_path / "search", base, len(trials))
    time.sleep(3)
    assert other.poll() is None
    search.close()  # its workers are gone: the other one takes their trials over
    assert other.wait(120) == 0
    assert begin(tmp_path / "search", base).ask() is None
