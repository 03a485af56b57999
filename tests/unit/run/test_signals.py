"""What a rank does on SIGINT, SIGTERM and both, also while its main thread is blocked."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

# Its main thread is in a call that no handler interrupts, as in a collective of torch.
RANK = """
import ctypes, sys
from lag_megatron.run.signals import StopFlag

stop = StopFlag()
print("ready", flush=True)
blocked = ctypes.CDLL(None).pthread_mutex_lock
lock = ctypes.create_string_buffer(64)
if sys.argv[1] == "blocked":
    blocked(lock)
    blocked(lock)
for line in sys.stdin:
    print(stop.asked, stop.why, flush=True)
"""


@pytest.fixture
def rank():
    started = []

    def start(how):
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, how], cwd=ROOT, env={**os.environ, "RANK": "0"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def state(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def send(process, *numbers):
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT,),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT, signal.SIGTERM),
    ],
    ids=["a key", "a launcher passes it on", "a terminal and a launcher"],
)
def test_one_ctrl_c_asks_to_save_however_often_it_is_passed_on(numbers, rank):
    process = rank("free")
    assert state(process) == "False another rank was asked to stop"
    send(process, *numbers)
    assert state(process) == "True received SIGINT"
    time.sleep(1.1)
    send(process, signal.SIGTERM)
    assert state(process) == "True received SIGINT"


@pytest.mark.parametrize("how", ["free", "blocked"])
def test_a_second_ctrl_c_leaves_at_once(how, rank):
    process = rank(how)
    send(process, signal.SIGINT)
    time.sleep(1.1)
    assert process.poll() is None
    send(process, signal.SIGINT)
    assert process.wait(10) == 130
    first, second = process.stderr.read().splitlines()
    assert first.startswith("interrupted: the run saves and ends.")
    assert "The steps since the last checkpoint are lost" in second


def test_ctrl_c_after_sigterm_is_the_first_one(rank):
    process = rank("free")
    send(process, signal.SIGTERM, signal.SIGINT)
    assert state(process) == "True received SIGTERM"


def test_signals_of_a_forked_child_are_its_own(rank):
    code = RANK.replace(
        'print("ready"',
        "import os, signal, time\nif not os.fork():\n    os.kill(os.getpid(), signal.SIGINT)\n"
        '    os._exit(0)\nos.wait()\nprint("ready"',
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "free"], cwd=ROOT, input="\n",
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines()[1] == "False another rank was asked to stop"
