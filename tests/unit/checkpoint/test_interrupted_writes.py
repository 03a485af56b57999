"""Ctrl-C at any moment of a write: it ends, in time, and the same call goes on from there."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from lag_megatron.process.interrupts import deferred_interrupts

# A checkpoint of many small parts.  The arguments are the target and what is done before.
JOB = """
import os, signal, sys, threading
from pathlib import Path
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.writer.job import Part, WriteJob, write

def part(number):
    def write_file(folder, context):
        path = folder / f"{number}.bin"
        path.write_bytes(bytes(1000))
        context.progress(1000)
        context.flush(path)
        return {path.name: manifest.file_entry(path)}
    return Part(str(number), write_file)

def job(target):
    return WriteJob(
        target=target, source=target.with_name("source"), parts=[part(n) for n in range(12)],
        metadata={}, needed=12000, title="the test", check=lambda: None,
    )
"""
LOCKED = """
enter, tries = threading.Condition.__enter__, int(sys.argv[2])
main = threading.get_ident()

def interrupted(condition):
    global tries
    result = enter(condition)
    if threading.get_ident() == main:
        tries -= 1
        if not tries:
            os.kill(os.getpid(), signal.SIGINT)  # the handler is called before this returns
    return result

threading.Condition.__enter__ = interrupted
try:
    write(job(Path(sys.argv[1])), workers=3)
    print("written")
except KeyboardInterrupt:
    print("interrupted")
"""
FORKED = """
import random, time
random.seed(int(sys.argv[2]))
folder, counts = Path(sys.argv[1]), {0: 0, 130: 0}
for number in range(int(sys.argv[3])):
    target = folder / str(number)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # not within the fork
    child = os.fork()
    if not child:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            write(job(target), workers=3)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGINT)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            sys.exit(f"try {number} hangs")
        time.sleep(0.001)
    counts[os.waitstatus_to_exitcode(ended[1])] += 1
    write(job(target), workers=3)  # goes on
print(counts[0], counts[130])
"""


def run(text, *arguments, timeout):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.mark.parametrize("tries", [1, 2, 4])
def test_ctrl_c_right_after_a_lock_was_acquired(tries, tmp_path):
    """Left acquired, it would be waited for by the threads that write."""
    done = run(JOB + LOCKED, tmp_path / "step1", tries, timeout=30)
    assert done.stdout == "interrupted\n", done.stderr
    assert not (tmp_path / "step1").exists()


@pytest.mark.slow
def test_ctrl_c_at_random_moments_never_hangs(tmp_path):
    done = run(JOB + FORKED, tmp_path, random.randrange(10**6), 600, timeout=600)
    assert done.returncode == 0, done.stderr
    written, interrupted = map(int, done.stdout.split())
    assert written + interrupted == 600
    assert interrupted > 60


def test_a_deferred_signal_is_handled_while_tasks_are_waited_for():
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(ended.wait, 60)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with deferred_interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
            interrupts.wait_for([task])
        assert not task.done()
        ended.set()


def test_a_deferred_signal_is_handled_at_the_end_of_the_block():
    passed = []

    def work():
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            passed.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert passed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_does_not_raise_lets_the_work_go_on():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with ThreadPoolExecutor(1) as pool, deferred_interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
            assert not seen
            interrupts.wait_for([pool.submit(time.sleep, 0.01)])
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_leaves_handlers_as_they_are():
    found = []

    def look():
        with deferred_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
