"""Longer kill tests: the demo itself, and kills at moments that nobody chose."""

import random
import signal
import time

import launcher
import pytest
from launcher import ROOT, finish, kill_all, ranks_of, run, start, wait_for
from test_run import SEARCH, decision_of, disturb, events_of, rows_of

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


@pytest.mark.parametrize(
    ("seed", "options"), [(0, []), (1, SEARCH), (2, [*SEARCH, "--set", "growth.rung_value=ema"])]
)
def test_a_storm_of_kills(seed, options, tiny, tmp_path):
    run(tiny, tmp_path / "undisturbed", *options)
    run_dir, moments = tmp_path / "killed", random.Random(seed)
    assert disturb(tiny, run_dir, options, moments, kills=10)
    run(tiny, run_dir, *options)
    assert_alike(run_dir, tmp_path / "undisturbed")
