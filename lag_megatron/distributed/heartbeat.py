"""Whether the other ranks are still there.

Ranks may wait for each other as long as one of them works, so a time-out of theirs cannot tell a
busy rank from one whose host, cable or process is lost.  So every rank keeps a connection to rank
0, over which both sides say every few seconds that they live.  A thread listens: it ends this
process when the other side has been silent for too long, or has died, and says whom it missed.
"""

import atexit
import faulthandler
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lag_megatron.errors import RunError

_BEAT, _GOODBYE, _NEWS = b".", b"q", b"!"
_BEAT_SECONDS = 5.0
_BEATS_PER_LIMIT = 4
# A rank that lost another usually fails by itself, and its own error says more than we can.
_GRACE_SECONDS = 5.0
# A connection that ends with beats unread is reset, and then the other side loses the news as well.
_LAST_WORDS_SECONDS = 0.5
# Ranks that all end for the same reason need not end at the same moment.
_LEAVING_SECONDS = 30.0
_HELLO_SECONDS = 10.0
_STDERR = 2
_HELLO = struct.Struct("!16sI")


@dataclass(slots=True)
class _Peer:
    rank: int
    host: str
    connection: socket.socket
    heard: float = field(default_factory=time.monotonic)
    left: float | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Heartbeat:
    """The thread that speaks to other ranks and listens to them."""

    def __init__(self, name: str, peers: Sequence[_Peer], *, limit: float) -> None:
        self._name, self._peers, self._limit = name, peers, limit
        self._beat = min(_BEAT_SECONDS, limit / _BEATS_PER_LIMIT)
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            peer.connection.setblocking(False)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take leave of the others: from now on nobody misses anybody."""
        if self._thread.is_alive():
            self._wake.send(_GOODBYE)
            self._thread.join(_HELLO_SECONDS)

    def _run(self) -> None:
        last = next_beat = time.monotonic()
        while True:
            events = self._selector.select(max(0.0, next_beat - time.monotonic()))
            now = time.monotonic()
            if now - last > 2 * self._beat:  # this process was frozen: others may have waited too
                for peer in self._peers:
                    peer.heard = now
            last = now
            for key, _ in events:
                if key.data is None:
                    self._say(_GOODBYE)
                    return
                self._listen(key.data, now)
            if now >= next_beat:
                next_beat = now + self._beat
                self._say(_BEAT)
                self._look(now)

    def _say(self, message: bytes) -> None:
        for peer in self._peers:
            try:
                peer.connection.send(message)
            except OSError:  # whether it is gone or only silent, listening tells
                continue

    def _listen(self, peer: _Peer, now: float) -> None:
        try:
            message = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"{peer} is lost: {error.strerror}")
        peer.heard = now
        words, news, reason = message.partition(_NEWS)
        if news:
            self._end(reason.decode(errors="replace"))
        elif _GOODBYE in words:
            peer.left = now
            self._selector.unregister(peer.connection)
        elif not words:
            self._end(f"{peer} is gone: killed, or its host is down")

    def _look(self, now: float) -> None:
        for peer in self._peers:
            if peer.left is not None:
                if now - peer.left > _LEAVING_SECONDS:
                    self._end(f"{peer} has ended early", at_once=True)
            elif now - peer.heard > self._limit:
                faulthandler.dump_traceback(_STDERR)  # where this rank waited
                silent = f"has been silent for {now - peer.heard:.0f} s"
                self._end(f"{peer} {silent} (parallel.timeout: {self._limit:g})", at_once=True)

    def _end(self, reason: str, *, at_once: bool = False) -> NoReturn:
        self._say(_NEWS + reason.encode())
        line = f"[{self._name}] {reason}. Ending; the same command goes on from what is saved.\n"
        os.write(_STDERR, line.encode())  # not through Python's file, which may belong to others
        time.sleep(_LAST_WORDS_SECONDS if at_once else _GRACE_SECONDS)
        os._exit(1)  # the main thread may wait for the lost rank for ever


_running: Heartbeat | None = None


def start(
    rank: int, hosts: Sequence[str], *, limit: float, broadcast: Callable[[Any], Any]
) -> None:
    """Watch over the other ranks from now on; every rank calls this.

    Args:
        rank: this process.
        hosts: the host's name of each rank.
        limit: seconds of silence after which a rank counts as lost.
        broadcast: gives rank 0's value to all ranks.

    Raises:
        RunError: if rank 0 cannot be reached, or somebody does not come.
    """
    global _running
    if len(hosts) == 1 or _running is not None:
        return
    if rank == 0:
        with listen(backlog=len(hosts)) as server:
            token = secrets.token_bytes(16)
            broadcast((server.getsockname()[1], token))
            peers = _accept(server, token, hosts, limit)
    else:
        port, token = broadcast(None)
        peers = [_Peer(0, hosts[0], _connect(port, token, rank, hosts[0], limit))]
    _running = Heartbeat(f"rank {rank} on {hosts[rank]}", peers, limit=limit)
    atexit.register(stop)


def stop() -> None:
    """Stop watching, if anybody watches."""
    global _running
    if _running is not None:
        _running.stop()
        _running = None


def listen(*, backlog: int = 512) -> socket.socket:
    """A socket for connections from other ranks, on a port that the system chooses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
        )
    return socket.create_server(("", 0), backlog=backlog)


def _accept(server: socket.socket, token: bytes, hosts: Sequence[str], limit: float) -> list[_Peer]:
    found: dict[int, _Peer] = {}
    deadline = time.monotonic() + limit
    while len(found) < len(hosts) - 1:
        server.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            missing = min(set(range(1, len(hosts))) - set(found))
            raise RunError(
                f"rank {missing} on {hosts[missing]} did not connect to rank 0 on {hosts[0]} "
                f"within {limit:g} s."
            ) from None
        connection.settimeout(_HELLO_SECONDS)
        try:
            with connection.makefile("rb") as file:
                theirs, rank = _HELLO.unpack(file.read(_HELLO.size))
        except (OSError, struct.error):
            theirs, rank = b"", 0
        if theirs == token:
            found[rank] = _Peer(rank, hosts[rank], connection)
        else:
            connection.close()  # somebody who knocks at ports
    return list(found.values())


def _connect(port: int, token: bytes, rank: int, host: str, limit: float) -> socket.socket:
    address = os.environ["MASTER_ADDR"], port
    try:
        connection = socket.create_connection(address, timeout=min(limit, _HELLO_SECONDS))
        connection.sendall(_HELLO.pack(token, rank))
    except OSError as error:
        raise RunError(
            f"rank {rank} cannot reach rank 0 on {host} at {address[0]}, port {port}: {error}. "
            "Ranks need each other's ports above 1024 open; MASTER_ADDR must be rank 0's host."
        ) from None
    return connection
