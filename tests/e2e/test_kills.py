"""Longer kill tests: the demo itself, and kills at moments that nobody chose."""

import random
import signal
import time

import launcher
import pytest
from launcher import ROOT, finish, kill_all, ranks_of, run, start, wait_for
from test_run import decision_of, events_of, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def assert_alike(run_dir, reference):
    assert decision_of(run_dir) == decision_of(reference)
    assert rows_of(run_dir) == rows_of(reference)
    last = [events_of(d, "run_finished")[-1]["val_loss"] for d in (run_dir, reference)]
    assert last[0] == last[1]


def test_the_demo_killed_three_times_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "PATIENCE_S", 900)
    demo = ROOT / "configs" / "demo.yaml"
    run(demo, tmp_path / "undisturbed")
    run_dir = tmp_path / "killed"
    for text, count in (('"checkpoint"', 2), ('"probe_finished"', 4), ('"event": "decision"', 1)):
        process = start(demo, run_dir)
        wait_for(run_dir / "journal.jsonl", text, process, count=count)
        if "probe" in text:
            time.sleep(3)  # into the next probe
        kill_all(process)
    run(demo, run_dir)
    assert_alike(run_dir, tmp_path / "undisturbed")


def test_a_signal_in_a_probe_costs_that_probe_alone(tiny, tmp_path):
    run(tiny, tmp_path / "undisturbed")
    run_dir = tmp_path / "signalled"
    process = start(tiny, run_dir)
    wait_for(run_dir / "journal.jsonl", '"probe_started"', process, count=2)
    for rank in ranks_of(process):
        rank.send_signal(signal.SIGUSR1)
    assert finish(process) == 0
    run(tiny, run_dir)
    assert_alike(run_dir, tmp_path / "undisturbed")
    finished = [event["id"] for event in events_of(run_dir, "probe_finished")]
    assert len(finished) == len(set(finished))


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_kills(seed, tiny, tmp_path):
    run(tiny, tmp_path / "undisturbed")
    run_dir, moments = tmp_path / "killed", random.Random(seed)
    kills = 0
    while kills < 10 and not events_of(run_dir, "run_finished"):
        before = len(events_of(run_dir, "run_started"))
        process = start(tiny, run_dir)
        wait_for(run_dir / "journal.jsonl", '"run_started"', process, count=before + 1)
        time.sleep(moments.uniform(0, 3))
        if process.poll() is not None:
            break
        kill_all(process)
        kills += 1
    run(tiny, run_dir)
    assert kills
    assert_alike(run_dir, tmp_path / "undisturbed")
