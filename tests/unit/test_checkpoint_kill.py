"""Kill -9 at any moment of writing: the target is absent or whole, and the same command goes on."""

import os
import random
import signal
import sys

import pytest

from lag_megatron.checkpoint import commit
from lag_megatron.growth.materialize import grow_checkpoint
from lag_megatron.growth.plan import GrowthPlan

PLAN = GrowthPlan(
    operator="lag",
    options={"index": 0, "block_size": 2, "init": "random"},
    source_layers=2,
    target_layers=4,
)
KILLS = 30


def fork(work):
    """Run ``work`` in a forked process and return how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def grow_until(source, target, last_call):
    """Grow, and die at the call number ``last_call`` of any function, Python's or C's."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")
        if calls == last_call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    grow_checkpoint(source, target, PLAN)
    sys.setprofile(None)
    return calls


def test_killed_at_any_moment(checkpoint, tmp_path):
    expected = tmp_path / "expected" / "step3"
    total = grow_until(checkpoint, expected, -1)
    files = commit.read_manifest(expected)["files"]
    random.seed(0)
    near_the_end = range(total - 90, total, 9)
    outcomes = set()
    for moment in [*random.sample(range(1, total), KILLS), *near_the_end]:
        target = tmp_path / str(moment) / "step3"
        ended = fork(lambda t=target, m=moment: grow_until(checkpoint, t, m))
        assert ended == -signal.SIGKILL
        latest = target.parent / "latest"
        if target.exists():
            assert list(commit.damages(target)) == []
            assert commit.read_manifest(target)["files"] == files
        else:
            assert not latest.exists()
        assert commit.committed(target.parent) == ([target] if target.exists() else [])
        outcomes.add((target.exists(), latest.exists(), commit.temporary(target).exists()))
        grow_checkpoint(checkpoint, target, PLAN)
        assert commit.read_manifest(target)["files"] == files
        assert latest.read_text() == "step3"
        assert sorted(p.name for p in target.parent.iterdir()) == ["latest", "step3"]
    assert (False, False, True) in outcomes
    assert any(whole for whole, _, _ in outcomes)


def test_removal_is_never_half_a_checkpoint(checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "step3"
    grow_checkpoint(checkpoint, target, PLAN)

    def killed(path, **options):
        raise InterruptedError

    monkeypatch.setattr(commit.shutil, "rmtree", killed)
    with pytest.raises(InterruptedError):
        commit.remove(target)
    assert not commit.is_committed(target)
