"""Parts of a checkpoint that are waited for, and what becomes of them when a key interrupts."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.writer import job
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.process.interrupts import DeferredInterrupts


def job_of(target, works):
    return WriteJob(
        target=target,
        source=target.with_name("source"),
        parts=[Part(name, work) for name, work in works.items()],
        metadata={},
        needed=0,
        title="the test",
        check=lambda: None,
    )


def test_the_first_that_fails_is_raised_before_others_end():
    may_end = threading.Event()

    def fail():
        raise OSError("no room")

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(may_end.wait, 60), pool.submit(fail)]
        with pytest.raises(OSError, match="no room"):
            DeferredInterrupts().wait_for(tasks)
        assert not tasks[0].done()
        may_end.set()
        DeferredInterrupts().wait_for(tasks[:1])
        assert tasks[0].done()


def test_who_waits_holds_no_lock_that_a_worker_needs(monkeypatch):
    """A condition of Python's is one: a key that interrupts its wait may leave it locked."""
    wait, here = threading.Condition.wait, threading.current_thread()

    def watched(condition, timeout=None):
        assert threading.current_thread() is not here
        return wait(condition, timeout)

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(time.sleep, 0.2) for _ in range(4)]
        with monkeypatch.context() as patch:
            patch.setattr(threading.Condition, "wait", watched)
            DeferredInterrupts().wait_for(tasks)
        assert all(task.done() for task in tasks)


def test_neither_parts_nor_their_flushes_are_waited_for_one_by_one(tmp_path, monkeypatch):
    """The wait for a task's result is on a condition, too."""
    result, flush, here = Future.result, job.flush_to_disk, threading.current_thread()
    flushed = []

    def watched(task, timeout=None):
        assert task.done() or threading.current_thread() is not here
        return result(task, timeout)

    def slow(path):
        time.sleep(0.05)
        flush(path)
        flushed.append(path.name)

    def write(folder, context):
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
        context.flush(folder / "inner" / "file")
        return {"inner/file": {"size": 7}}

    monkeypatch.setattr(Future, "result", watched)
    monkeypatch.setattr(job, "flush_to_disk", slow)
    assert job.write(job_of(tmp_path / "step3", {"only": write}))
    assert flushed == ["file", "inner"]


def test_a_key_before_all_parts_have_begun_ends_those_that_have(tmp_path, monkeypatch):
    begun, ended = threading.Event(), []

    def write(folder, context):
        begun.set()
        try:
            for _ in range(600):
                context.progress(1)
                time.sleep(0.05)
        except job._AnotherFailed:
            ended.append(True)
            raise

    class Interrupted(ThreadPoolExecutor):
        """Its user is, at the second part."""

        def submit(self, work, *given):
            if given and getattr(given[0], "name", None) == "second":
                assert begun.wait(60)
                raise KeyboardInterrupt
            return super().submit(work, *given)

    monkeypatch.setattr(job, "ThreadPoolExecutor", Interrupted)
    target = tmp_path / "step3"
    with pytest.raises(KeyboardInterrupt):
        job.write(job_of(target, {"first": write, "second": write}), workers=2)
    assert ended == [True]
    assert not target.exists()
    assert manifest.temporary(target).is_dir()  # the same call goes on from it
