"""Kill -9 at any moment of writing: the target is absent or whole, and the same command goes on."""

import itertools
import os
import random
import shutil
import signal
import sys
import threading

import pytest

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.plan import GrowthPlan

PLAN = GrowthPlan(
    operator="lag",
    options={"index": 0, "block_size": 2, "init": "random"},
    source_layers=2,
    target_layers=4,
)
ANYWHERE, AT_THE_END = 24, 16


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


def grow_until(source, target, last_call, *, publishing=False):
    """Grow, and die at the call number ``last_call`` of any function, Python's or C's.

    Calls of all threads count; how they take turns differs a little from run to run.  With
    ``publishing``, those from the beginning of the commit on, which one thread makes alone.
    """
    number = itertools.count(1)  # one step of the interpreter, so that threads can share it
    calls, begun = 0, not publishing

    def count(frame, event, argument):
        nonlocal calls, begun
        begun = begun or frame.f_code is manifest.commit.__code__
        if begun and event in ("call", "c_call"):
            calls = next(number)
            if calls == last_call:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        grow_checkpoint(source, target, PLAN)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls


def test_killed_at_any_moment(checkpoint, tmp_path):
    expected = tmp_path / "expected" / "step3"
    grow_checkpoint(checkpoint, expected, PLAN)  # first, so that everything is imported
    files = manifest.read_manifest(expected)["files"]
    total = grow_until(checkpoint, tmp_path / "counted" / "step3", -1)
    last = grow_until(checkpoint, tmp_path / "published" / "step3", -1, publishing=True)
    assert 50 < last < total / 10
    chance = random.Random(0)
    moments = [(moment, False) for moment in chance.sample(range(1, total - last), ANYWHERE)]
    moments += [(1 + last * part // AT_THE_END, True) for part in range(AT_THE_END)]
    # The last calls, between the rename and `latest`: most before are those of writing JSON.
    moments += [(last - back, True) for back in (4, 8, 16, 24)]
    outcomes = set()
    for moment, publishing in moments:
        target = tmp_path / f"{moment}-{publishing}" / "step3"
        while (
            fork(
                lambda t=target, m=moment, p=publishing: grow_until(checkpoint, t, m, publishing=p)
            )
            != -signal.SIGKILL
        ):  # it took fewer calls than before, and came to its end
            assert not publishing
            shutil.rmtree(target.parent)
            moment = moment * 3 // 4
        latest = target.parent / "latest"
        if target.exists():
            assert list(manifest.find_corrupted_files(target)) == []
            assert manifest.read_manifest(target)["files"] == files
        else:
            assert not latest.exists()
        assert manifest.committed_tags(target.parent) == ([target] if target.exists() else [])
        outcomes.add((target.exists(), latest.exists(), manifest.temporary(target).exists()))
        grow_checkpoint(checkpoint, target, PLAN)
        assert manifest.read_manifest(target)["files"] == files
        assert latest.read_text() == "step3"
        assert sorted(p.name for p in target.parent.iterdir()) == ["latest", "step3"]
    assert (False, False, True) in outcomes
    assert (True, False, False) in outcomes


def test_removal_is_never_half_a_checkpoint(checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "step3"
    grow_checkpoint(checkpoint, target, PLAN)

    def killed(path, **options):
        raise InterruptedError

    monkeypatch.setattr(manifest.shutil, "rmtree", killed)
    with pytest.raises(InterruptedError):
        manifest.remove_checkpoint(target)
    assert not manifest.is_committed(target)
