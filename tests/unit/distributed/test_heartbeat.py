"""Ranks that notice each other's death, and are not disturbed by strangers."""

import multiprocessing
import os
import re
import signal
import socket
import time

import pytest

from lag_megatron.distributed import heartbeat
from lag_megatron.errors import RunError

HOSTS = ["node-a", "node-b", "node-c"]
LIMIT = 3.0
PATIENCE_S = 20  # for what happens soon, except on a machine that has other things to do
context = multiprocessing.get_context("fork")


class Ranks:
    """Three processes that watch each other while their main threads do nothing."""

    def __init__(self, folder, limit, *, strangers=()):
        self._strangers = strangers
        self.logs = [folder / f"{rank}.err" for rank in range(len(HOSTS))]
        self._values = context.SimpleQueue()
        self._ready = context.SimpleQueue()
        self.processes = [
            context.Process(target=self._work, args=(rank, limit)) for rank in range(len(HOSTS))
        ]
        for process in self.processes:
            process.start()
        for _ in HOSTS:
            self._ready.get()

    def _broadcast(self, value):
        if value is None:
            return self._values.get()
        self._connections = [self._stranger(value[0], sent) for sent in self._strangers]
        for _ in HOSTS[1:]:
            self._values.put(value)
        return value

    def _stranger(self, port, sent):
        opened = socket.create_connection(("127.0.0.1", port))
        opened.sendall(sent)
        return opened

    def _work(self, rank, limit):
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.dup2(os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT), 2)
        stopped = []
        signal.signal(signal.SIGUSR1, lambda *_: stopped.append(True))
        heartbeat.start(rank, HOSTS, limit=limit, broadcast=self._broadcast)
        self._ready.put(rank)
        while not stopped:
            time.sleep(0.05)
        heartbeat.stop()

    def send(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def codes(self, *ranks, within):
        """Exit codes; None for those that live."""
        deadline = time.monotonic() + within
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def stderr(self, rank):
        return self.logs[rank].read_text()

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(heartbeat, "_EARLY_EXIT_SECONDS", 2.0)
    group = Ranks(tmp_path, LIMIT)
    yield group
    group.close()


def test_ranks_that_live_end_nothing(ranks):
    assert ranks.codes(0, 1, 2, within=1.5 * LIMIT) == [None, None, None]
    for rank in range(3):
        ranks.send(rank, signal.SIGUSR1)
    assert ranks.codes(0, 1, 2, within=PATIENCE_S) == [0, 0, 0]
    assert [ranks.stderr(rank) for rank in range(3)] == ["", "", ""]


def test_a_frozen_rank_ends_all_others(ranks):
    ranks.send(2, signal.SIGSTOP)
    assert ranks.codes(0, 1, within=PATIENCE_S) == [1, 1]
    for rank, host in ((0, "node-a"), (1, "node-b")):
        line = rf"\[rank {rank} on {host}\] rank 2 on node-c has been silent for \d+ s "
        assert re.search(line + r"\(parallel.timeout: 3\). Ending;", ranks.stderr(rank))
    assert "test_heartbeat.py" in ranks.stderr(0)  # the stack of the main thread
    ranks.send(2, signal.SIGCONT)
    assert ranks.codes(2, within=PATIENCE_S) == [1]


def test_a_frozen_rank_0_ends_all_others(ranks):
    ranks.send(0, signal.SIGSTOP)
    assert ranks.codes(1, 2, within=PATIENCE_S) == [1, 1]
    assert "rank 0 on node-a has been silent" in ranks.stderr(1)
    assert "rank 0 on node-a has been silent" in ranks.stderr(2)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all_others_at_once(ranks, killed):
    ranks.send(killed, signal.SIGKILL)
    others = [rank for rank in range(3) if rank != killed]
    assert ranks.codes(*others, within=PATIENCE_S) == [1, 1]
    for rank in others:
        assert f"rank {killed} on {HOSTS[killed]} is gone: killed" in ranks.stderr(rank)


def test_a_rank_that_ends_by_itself_gives_the_others_time_to_end(ranks):
    ranks.send(1, signal.SIGUSR1)
    assert ranks.codes(1, within=PATIENCE_S) == [0]
    assert ranks.codes(0, 2, within=0.5) == [None, None]
    assert ranks.codes(0, 2, within=PATIENCE_S) == [1, 1]
    assert "rank 1 on node-b has ended early" in ranks.stderr(2)


def test_ranks_that_were_all_frozen_go_on(ranks):
    for rank in range(3):
        ranks.send(rank, signal.SIGSTOP)
    time.sleep(1.5 * LIMIT)
    for rank in range(3):
        ranks.send(rank, signal.SIGCONT)
    assert ranks.codes(0, 1, 2, within=LIMIT) == [None, None, None]


def test_strangers_at_the_port_of_rank_0_change_nothing(tmp_path):
    """Ranks connect within their limit, though strangers that send nothing came first."""
    strangers = [b""] * 20 + [b"GET / HTTP/1.1\r\n\r\n" + bytes(100)] * 20
    ranks = Ranks(tmp_path, LIMIT, strangers=strangers)
    assert ranks.codes(0, 1, 2, within=1.5 * LIMIT) == [None, None, None]
    for rank in range(3):
        ranks.send(rank, signal.SIGUSR1)
    assert ranks.codes(0, 1, 2, within=PATIENCE_S) == [0, 0, 0]
    ranks.close()


def test_rank_0_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RunError, match=r"rank 1 cannot reach rank 0 on node-a at 127.0.0.1, port"):
        heartbeat.start(1, HOSTS, limit=1, broadcast=lambda _: (1, bytes(32)))


def test_a_rank_that_does_not_connect_is_named():
    with pytest.raises(RunError, match="rank 1 on node-b did not connect to rank 0 on node-a"):
        heartbeat.start(0, HOSTS, limit=0.2, broadcast=lambda value: value)
