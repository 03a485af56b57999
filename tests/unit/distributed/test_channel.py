"""Connections between ranks: messages, strangers at the port, and errors."""

import queue
import socket
import struct
import threading
import time

import pytest

from lag_megatron.distributed import channel
from lag_megatron.errors import RunError

PATIENCE_S = 20


class Clients:
    """Those that a server has accepted, in order."""

    def __init__(self):
        self._arrived = queue.SimpleQueue()

    def add(self, index, opened):
        self._arrived.put((index, opened))

    def next(self):
        return self._arrived.get(timeout=PATIENCE_S)

    @property
    def empty(self):
        return self._arrived.empty()


@pytest.fixture(autouse=True)
def _local_address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.fixture
def clients():
    return Clients()


@pytest.fixture
def server(clients):
    made = channel.Server(clients.add)
    yield made
    made.close()
    for opened in made.channels:
        opened.close()


def connected(server, index=1, **options):
    return channel.connect(
        server.port, server.secret, index=index, source=f"rank {index}", **options
    )


def unaccepted(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)


def is_closed(opened):
    """Whether the other side closes the connection; waits for it."""
    opened.settimeout(PATIENCE_S)
    try:
        return opened.recv(1) == b""
    except ConnectionResetError:  # closed before it had read all that was sent
        return True


@pytest.mark.parametrize("message", [b".", b"x" * 1000, b"y" * 3_000_000])
def test_messages_arrive_whole_both_ways(message, server, clients):
    here = connected(server, index=7)
    index, there = clients.next()
    assert index == 7
    sender = threading.Thread(target=here.send, args=(message,))
    sender.start()
    assert there.receive() == message
    sender.join()
    sender = threading.Thread(target=there.send, args=(message,))
    sender.start()
    assert here.receive() == message
    sender.join()
    here.close()


def test_several_threads_send_whole_messages(server, clients):
    here = connected(server)
    _, there = clients.next()
    messages = [bytes([65 + i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=here.send, args=(m,)) for m in messages]
    for thread in threads:
        thread.start()
    assert sorted(there.receive() for _ in messages) == messages
    for thread in threads:
        thread.join()
    here.close()


def test_a_client_is_among_the_channels_once_it_is_connected(server):
    opened = [connected(server, index=i) for i in range(20)]
    assert len(server.channels) == 20
    for one in server.channels:
        one.send(b"pushed")
    assert [one.receive() for one in opened] == [b"pushed"] * 20
    for one in opened:
        one.close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 on this machine")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_server_listens_on_both_ip_families(address, server, clients, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", address)
    connected(server, index=3).close()
    assert clients.next()[0] == 3


def test_the_end_of_a_connection_is_an_eof_error(server, clients):
    here = connected(server)
    _, there = clients.next()
    assert not there.poll()
    here.close()
    with pytest.raises(EOFError):
        there.receive()
    assert there.poll()


def test_half_a_message_does_not_make_a_channel_readable(server, clients):
    """A thread that serves many channels must not wait for the rest of one's message."""
    with unaccepted(server) as here:
        here.sendall(server.secret + struct.pack("!I", 1))
        _, there = clients.next()
        here.sendall(struct.pack("!i", 1))
        time.sleep(0.2)
        assert not there.poll()
        here.sendall(b".")
        assert there.receive() == b"."


# Strangers

GARBAGE = {
    "wrong secret": bytes(36),
    "huge length": struct.pack("!i", 0x7FFFFFFF) + bytes(32),
    "huge long length": struct.pack("!iQ", -1, 2**62) + bytes(24),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
    "a lot": bytes(1_000_000),
}


@pytest.mark.parametrize("sent", GARBAGE.values(), ids=GARBAGE)
def test_a_stranger_is_disconnected_at_once_and_changes_nothing(sent, server, clients):
    with unaccepted(server) as opened:
        try:
            opened.sendall(sent)
            closed = is_closed(opened)
        except (BrokenPipeError, ConnectionResetError):
            closed = True
        assert closed
    assert clients.empty
    assert not server.channels
    here = connected(server, index=2)
    index, there = clients.next()
    here.send(b"hello")
    assert (index, there.receive()) == (2, b"hello")
    here.close()


def test_the_secret_is_proven_before_the_index_is_read(server, clients):
    with unaccepted(server) as opened:
        opened.sendall(server.secret[:-1] + bytes([server.secret[-1] ^ 1]))
        assert is_closed(opened)
    assert clients.empty


def test_the_secret_is_compared_in_constant_time(server, clients, monkeypatch):
    compared = []
    honest = channel.hmac.compare_digest
    monkeypatch.setattr(
        channel.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or honest(a, b)
    )
    connected(server).close()
    clients.next()
    assert compared == [(server.secret, server.secret)]


def test_silent_strangers_keep_nobody_waiting(server, clients):
    silent = [unaccepted(server) for _ in range(50)]
    began = time.monotonic()
    connected(server, index=4).close()
    assert clients.next()[0] == 4
    assert time.monotonic() - began < channel.HANDSHAKE_SECONDS / 3
    for opened in silent:
        opened.close()


@pytest.mark.parametrize("part", ["nothing", "half a secret", "a secret"])
def test_a_stranger_has_limited_time(part, clients, monkeypatch):
    monkeypatch.setattr(channel, "HANDSHAKE_SECONDS", 0.5)
    server = channel.Server(clients.add)
    sent = {"nothing": b"", "half a secret": server.secret[:16], "a secret": server.secret}[part]
    with unaccepted(server) as opened:
        opened.sendall(sent)
        began = time.monotonic()
        assert is_closed(opened)
        assert time.monotonic() - began < PATIENCE_S / 2
    server.close()
    assert clients.empty


def test_a_stranger_that_sends_slowly_has_no_more_time(clients, monkeypatch):
    monkeypatch.setattr(channel, "HANDSHAKE_SECONDS", 1.0)
    server = channel.Server(clients.add)
    began = time.monotonic()
    with unaccepted(server) as opened:
        while time.monotonic() - began < PATIENCE_S:
            time.sleep(0.3)
            try:
                opened.sendall(b"x")
            except OSError:  # closed by the server
                break
    assert time.monotonic() - began < PATIENCE_S / 2
    server.close()


# Errors of a client

CANNOT = (
    r"probe group 1 cannot reach rank 0 at 127\.0\.0\.1, port \d+: .+\. "
    r"Ranks need each other's ports above 1024 open; MASTER_ADDR must be rank 0's host\.$"
)


def test_a_port_where_nobody_listens_is_named():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(RunError, match=CANNOT):
        channel.connect(port, bytes(32), index=1, source="probe group 1")


def test_a_wrong_secret_is_the_same_error(server):
    with pytest.raises(RunError, match=CANNOT):
        channel.connect(server.port, bytes(32), index=1, source="probe group 1")


def test_a_server_that_does_not_answer_is_the_same_error():
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        port = frozen.getsockname()[1]
        with pytest.raises(RunError, match=CANNOT):
            channel.connect(port, bytes(32), index=1, source="probe group 1", timeout=0.2)


# The end of a server


def test_a_closed_server_accepts_nobody_and_keeps_its_channels(clients):
    server = channel.Server(clients.add)
    here = connected(server)
    _, there = clients.next()
    port, secret = server.port, server.secret
    server.close()
    with pytest.raises(RunError, match="cannot reach rank 0"):
        channel.connect(port, secret, index=2, source="rank 2")
    here.send(b"still here")
    assert there.receive() == b"still here"
    here.close()
    there.close()


def test_a_closed_server_leaves_no_thread(clients):
    before = set(threading.enumerate())
    server = channel.Server(clients.add)
    connected(server).close()
    clients.next()[1].close()
    server.close()
    deadline = time.monotonic() + PATIENCE_S
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before


def test_a_server_that_runs_out_of_file_descriptors_goes_on(clients, monkeypatch):
    honest, failures = socket.socket.accept, iter([OSError(24, "Too many open files")] * 2)

    def accept(self):
        for error in failures:
            raise error
        return honest(self)

    monkeypatch.setattr(socket.socket, "accept", accept)
    server = channel.Server(clients.add)
    connected(server, index=5).close()
    assert clients.next()[0] == 5
    server.close()
