"""Questions to the coordinator from other ranks, which are threads here, over real connections."""

import json
import math
import os
import socket
import threading
import time
from dataclasses import replace

import pytest
from probing import SimulatedSearch

from lag_megatron.distributed import channel
from lag_megatron.errors import RunError
from lag_megatron.search.event import Assignment, ProbeResult
from lag_megatron.search.rpc import CoordinatorServer, LocalClient, RemoteClient

PATIENCE_S = 20
ROW = {"step": 4, "val_loss": 0.1 + 0.2, "val_loss_batches": [1 / 3, 2e-300]}
RESULT = ProbeResult(
    candidate=2,
    rung=4,
    steps=4,
    evaluations=(ROW, {**ROW, "step": 5}),
    train_rows=({"step": 4, "stage": 1, "train/loss": math.pi, "note": "\u00e9"},),
    state="step00000104",
    failure="",
    seconds=1e-9,
)


class Flag:
    """As a StopFlag, without signals."""

    def __init__(self):
        self.asked, self.why = False, ""

    def ask(self, reason):
        if not self.asked:
            self.why, self.asked = reason, True


class FakeCoordinator:
    """Hands out the given assignments and keeps what it was asked."""

    def __init__(self, assignments=()):
        self.assignments, self.asked, self.recorded, self.stopped = list(assignments), [], [], []
        self.on_stop = None

    def ask(self, group, loaded, *, stopped):
        self.asked.append((group, loaded))
        while not self.assignments:
            if reason := stopped():
                self.stop(reason)
                return Assignment(stop=reason)
            time.sleep(0.01)
        return self.assignments.pop(0)

    def needs_checkpoint(self, result):
        self.recorded.append(result)
        return result.candidate % 2 == 0

    def record(self, group, result):
        self.recorded.append((group, result))

    def stop(self, reason):
        if not self.stopped:
            self.on_stop(reason)
        self.stopped.append(reason)


@pytest.fixture
def serve(monkeypatch):
    """A server for a coordinator, and a function that connects a leader to it."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    servers = []

    def start(coordinator):
        server = CoordinatorServer(coordinator, Flag())
        servers.append(server)

        def client(group):
            port, secret = server.address
            opened = channel.connect(port, secret, index=group, source=f"probe group {group}")
            flag = Flag()
            return RemoteClient(opened, flag), flag, opened

        return server, client

    yield start
    for server in servers:
        server.close()


def cut(connection):
    """Close a connection as the system does when a process dies."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_questions_and_answers_arrive_as_they_were_sent(serve):
    assignment = Assignment(candidate=3, rung=8, trained_steps=4, attempt=2)
    coordinator = FakeCoordinator([assignment, Assignment()])
    server, connect = serve(coordinator)
    client, flag, _ = connect(5)
    assert client.ask(None) == assignment
    assert client.needs_checkpoint(RESULT) is True
    assert client.needs_checkpoint(replace(RESULT, candidate=1)) is False
    client.record(RESULT)
    assert client.ask(3) == Assignment()
    assert coordinator.asked == [(5, None), (5, 3)]
    assert coordinator.recorded == [RESULT, replace(RESULT, candidate=1), (5, RESULT)]
    time.sleep(0.2)  # the server closes the connection now, which is no loss of the coordinator
    assert not flag.asked
    assert not coordinator.stopped
    assert server.failure is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_arrive(loss, serve):
    coordinator = FakeCoordinator()
    client, *_ = serve(coordinator)[1](1)
    client.record(replace(RESULT, evaluations=({"step": 1, "val_loss": loss},)))
    (arrived,) = coordinator.recorded[0][1].evaluations
    assert arrived["val_loss"] == loss or math.isnan(arrived["val_loss"]) == math.isnan(loss)


def test_messages_are_json(serve, monkeypatch):
    sent, honest = [], channel.Channel.send
    monkeypatch.setattr(
        channel.Channel, "send", lambda self, data: (sent.append(data), honest(self, data))
    )
    client, *_ = serve(FakeCoordinator([Assignment()]))[1](1)
    client.record(RESULT)
    client.ask(None)
    assert [sorted(json.loads(data)) for data in sent] == [
        ["argument", "call"],
        ["answer", "last"],
    ] * 2


def test_a_stop_reaches_all_groups_at_once(serve):
    coordinator = FakeCoordinator()
    server, connect = serve(coordinator)
    leaders = [connect(group) for group in range(1, 5)]
    leaders[1][0].stop("received SIGTERM")
    wait_until(lambda: all(flag.asked for _, flag, _ in leaders))  # while none of them asks
    assert {flag.why for _, flag, _ in leaders} == {"received SIGTERM"}
    assert server._flag.why == "received SIGTERM"


def test_a_stop_of_rank_0_reaches_the_other_groups(serve):
    coordinator = FakeCoordinator()
    server, connect = serve(coordinator)
    _, flag, _ = connect(1)
    LocalClient(coordinator, server._flag).stop("received SIGUSR1")
    wait_until(lambda: flag.asked)
    assert flag.why == "received SIGUSR1"


def test_a_leader_that_is_signalled_while_it_waits_stops_the_search(serve):
    coordinator = FakeCoordinator()
    client, flag, _ = serve(coordinator)[1](1)
    threading.Timer(0.2, flag.ask, ("received SIGTERM",)).start()
    assert client.ask(None) == Assignment(stop="received SIGTERM")
    assert coordinator.stopped == ["received SIGTERM"]


def test_a_signal_that_comes_after_the_answer_stops_the_search(serve):
    coordinator = FakeCoordinator()
    _, connect = serve(coordinator)
    _, _, opened = connect(1)
    opened.send(json.dumps({"signal": "received SIGTERM"}).encode())
    wait_until(lambda: coordinator.stopped)
    assert coordinator.stopped == ["received SIGTERM"]


@pytest.mark.parametrize("waits", [False, True])
def test_a_group_that_dies_stops_the_others_at_once(waits, serve):
    coordinator = FakeCoordinator()
    server, connect = serve(coordinator)
    _, flag, _ = connect(1)
    _, _, dying = connect(2)
    if waits:
        dying.send(json.dumps({"call": "ask", "argument": None}).encode())
        wait_until(lambda: coordinator.asked)
    cut(dying)
    wait_until(lambda: flag.asked)
    assert flag.why == "probe group 2 is gone"
    assert server.failure is None


def test_a_coordinator_that_dies_is_noticed_at_once(serve):
    coordinator = FakeCoordinator()
    server, connect = serve(coordinator)
    client, flag, _ = connect(1)
    (connection,) = server._server.channels
    cut(connection)
    wait_until(lambda: flag.asked)
    assert flag.why == "the coordinator on rank 0 is gone"
    for _ in range(2):
        with pytest.raises(RunError, match=r"coordinator on rank 0 is gone\. The same command"):
            client.ask(None)


@pytest.mark.parametrize("error", [ValueError("no space"), OSError(28, "No space left")])
def test_an_error_of_the_coordinator_ends_all_groups_and_is_kept(error, serve, monkeypatch):
    coordinator = FakeCoordinator()

    def record(group, result):
        raise error

    monkeypatch.setattr(coordinator, "record", record)
    server, connect = serve(coordinator)
    client, _, _ = connect(1)
    _, other, _ = connect(2)
    with pytest.raises(RunError, match="the coordinator on rank 0 is gone"):
        client.record(RESULT)
    wait_until(lambda: other.asked)
    assert other.why == f"the coordinator failed: {error}"
    assert server.failure is error


def test_groups_on_other_ranks_decide_as_one_group_does(serve, tmp_path, monkeypatch):
    """Real coordinators: one asked by a local group, one by three remote groups."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    expected, *_ = SimulatedSearch(tmp_path / "local").work()
    search = SimulatedSearch(tmp_path / "remote")
    coordinator = search.coordinator()
    _, connect = serve(coordinator)

    def work(group):
        client, *_ = connect(group)
        loaded = None
        while (assignment := client.ask(loaded)).candidate is not None:
            result = search.advance(assignment, client.needs_checkpoint)
            loaded = assignment.candidate
            client.record(result)

    threads = [threading.Thread(target=work, args=(group,)) for group in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    decision, _ = coordinator.decide()
    assert decision["chosen"] == expected["chosen"]
    assert decision["candidates"] == expected["candidates"]
