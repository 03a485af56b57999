"""A run over two hosts, which are network namespaces of this machine."""

import time

import pytest
from hosts import launch, log_of, run_on, two_hosts, why_not
from launcher import finish, run, wait_for
from test_run import SEARCH, decision_of, events_of, rows_of

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

OPTIONS = SEARCH  # a probe group on each host


@pytest.fixture
def hosts():
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def on_one_host(tiny_tree, tmp_path_factory):
    """The same run with both ranks on this machine."""
    folder = tmp_path_factory.mktemp("one_host")
    run(tiny_tree(folder), folder / "run", *OPTIONS)
    return folder / "run"


def assert_alike(run_dir, reference):
    assert decision_of(run_dir) == decision_of(reference)
    assert rows_of(run_dir) == rows_of(reference)
    last = [events_of(d, "run_finished")[-1]["val_loss"] for d in (run_dir, reference)]
    assert last[0] == last[1]


@pytest.mark.slow
def test_two_hosts_train_what_one_host_trains(hosts, on_one_host, tiny, tmp_path):
    run_dir = tmp_path / "run"
    run_on(hosts, tiny, run_dir, *OPTIONS)
    assert_alike(run_dir, on_one_host)


def test_a_host_dies_in_a_probe_and_the_same_command_goes_on(hosts, on_one_host, tiny, tmp_path):
    run_dir = tmp_path / "run"
    first, _ = launch(hosts, tiny, run_dir, *OPTIONS)
    wait_for(run_dir / "journal.jsonl", '"probe_started"', first, count=2)
    hosts[1].kill()
    died = time.monotonic()
    assert finish(first) != 0
    assert time.monotonic() - died < 60
    assert "rank 1 on node-b is gone" in log_of(hosts[0], run_dir).read_text()
    assert not events_of(run_dir, "run_finished")
    run_on(hosts, tiny, run_dir, *OPTIONS)
    assert_alike(run_dir, on_one_host)


@pytest.fixture
def training(hosts, tiny, tmp_path):
    """A run that both hosts are in the middle of: its launchers, folder and options."""
    run_dir = tmp_path / "run"
    options = ["--set", "stages=[{steps: 100}]", "--set", "parallel.timeout=10"]
    launchers = launch(hosts, tiny, run_dir, *options)
    wait_for(run_dir / "metrics.jsonl", '"step": 12,', launchers[0])
    return launchers, run_dir, options


@pytest.mark.slow
def test_a_cut_cable_ends_both_hosts(hosts, training, tiny):
    launchers, run_dir, options = training
    hosts[1].link("down")
    cut = time.monotonic()
    assert all(finish(launcher) != 0 for launcher in launchers)
    assert time.monotonic() - cut < 40
    assert "rank 1 on node-b has been silent" in log_of(hosts[0], run_dir).read_text()
    assert "rank 0 on node-a has been silent" in log_of(hosts[1], run_dir).read_text()
    hosts[1].link("up")
    run_on(hosts, tiny, run_dir, *options)
    assert [r["step"] for r in rows_of(run_dir) if "train/loss" in r] == list(range(1, 101))


@pytest.mark.slow
def test_a_frozen_rank_ends_the_other_host(hosts, training):
    (first, second), run_dir, _ = training
    (frozen,) = hosts[1].ranks()
    frozen.suspend()
    began = time.monotonic()
    assert finish(first) != 0
    assert time.monotonic() - began < 40
    assert "rank 1 on node-b has been silent" in log_of(hosts[0], run_dir).read_text()
    frozen.resume()  # it finds that it was missed
    assert finish(second) != 0
    assert "rank 1 on node-b has been silent" in log_of(hosts[1], run_dir).read_text()
