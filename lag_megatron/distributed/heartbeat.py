"""Detects that another rank has died or does not respond, and ends this process.

Ranks may wait for each other as long as one of them works, so a time limit on a collective cannot
distinguish a busy rank from one whose host, cable or process is lost.  So every rank keeps a
connection to rank 0, and both sides send a message every few seconds.  A thread receives them.
When the other side has been silent for too long, or its connection breaks, it names that rank and
ends this process.
"""

import atexit
import faulthandler
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lag_megatron.distributed import channel
from lag_megatron.distributed.channel import Channel
from lag_megatron.errors import RunError

# Messages: "I am alive", "I end as intended", and, before a reason, "I end because of this".
_ALIVE, _FINISHED, _FAILED = b".", b"q", b"!"
_INTERVAL_SECONDS = 5.0
_MESSAGES_PER_LIMIT = 4
# A rank that lost another usually fails by itself, and its own error says more than we can.
_GRACE_SECONDS = 5.0
# A connection that ends with messages unread is reset, and then the other side loses the reason.
_FLUSH_SECONDS = 0.5
# Ranks that all end for the same reason need not end at the same moment.
_EARLY_EXIT_SECONDS = 30.0
_JOIN_SECONDS = 10.0
_STDERR = 2


@dataclass(slots=True)
class _Peer:
    rank: int
    host: str
    channel: Channel
    last_received: float = field(default_factory=time.monotonic)
    finished: float | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Heartbeat:
    """The thread that exchanges messages with other ranks.

    Args:
        name: of this rank, for its messages.
        peers: on rank 0 all other ranks, elsewhere rank 0.
        limit: seconds without a message after which a peer counts as lost.
    """

    def __init__(self, name: str, peers: Sequence[_Peer], *, limit: float) -> None:
        self._name, self._peers, self._limit = name, peers, limit
        self._interval = min(_INTERVAL_SECONDS, limit / _MESSAGES_PER_LIMIT)
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            # One peer that takes no more messages must not keep the thread from all others.
            os.set_blocking(peer.channel.fileno(), False)
            self._selector.register(peer.channel, selectors.EVENT_READ, peer)
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tell the peers that this rank ends as intended, and stop watching them."""
        if self._thread.is_alive():
            self._wake.send(_FINISHED)
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        last = next_send = time.monotonic()
        while True:
            events = self._selector.select(max(0.0, next_send - time.monotonic()))
            now = time.monotonic()
            if now - last > 2 * self._interval:  # this process was frozen: peers may have been too
                for peer in self._peers:
                    peer.last_received = now
            last = now
            for key, _ in events:
                if key.data is None:
                    self._send(_FINISHED)
                    return
                self._receive(key.data, now)
            if now >= next_send:
                next_send = now + self._interval
                self._send(_ALIVE)
                self._check_limits(now)

    def _send(self, message: bytes) -> None:
        for peer in self._peers:
            try:
                peer.channel.send(message)
            except OSError:  # whether it has died or is only silent, receiving shows
                continue

    def _receive(self, peer: _Peer, now: float) -> None:
        try:
            message = peer.channel.receive()
        except BlockingIOError:  # nothing, or half a reason, whose sender is about to end
            return
        except EOFError:
            self._exit(f"{peer} is gone: killed, or its host is down")
        except OSError as error:
            self._exit(f"{peer} is lost: {error.strerror or error}")
        peer.last_received = now
        if message.startswith(_FAILED):
            self._exit(message.removeprefix(_FAILED).decode(errors="replace"))
        if message == _FINISHED:
            peer.finished = now
            self._selector.unregister(peer.channel)

    def _check_limits(self, now: float) -> None:
        for peer in self._peers:
            if peer.finished is not None:
                if now - peer.finished > _EARLY_EXIT_SECONDS:
                    self._exit(f"{peer} has ended early", at_once=True)
            elif now - peer.last_received > self._limit:
                faulthandler.dump_traceback(_STDERR)  # where this rank waited
                silent = f"has been silent for {now - peer.last_received:.0f} s"
                self._exit(f"{peer} {silent} (parallel.timeout: {self._limit:g})", at_once=True)

    def _exit(self, reason: str, *, at_once: bool = False) -> NoReturn:
        self._send(_FAILED + reason.encode())
        line = f"[{self._name}] {reason}. Ending; the same command goes on from what is saved.\n"
        os.write(_STDERR, line.encode())  # another thread may hold the lock of sys.stderr
        time.sleep(_FLUSH_SECONDS if at_once else _GRACE_SECONDS)
        os._exit(1)  # the main thread may wait for the lost rank for ever


_running: Heartbeat | None = None


def start(
    rank: int, hosts: Sequence[str], *, limit: float, broadcast: Callable[[Any], Any]
) -> None:
    """Watch the other ranks from now on; every rank calls this.

    Args:
        rank: of this process.
        hosts: the host's name of each rank.
        limit: seconds without a message after which a rank counts as lost.
        broadcast: gives rank 0's value to all ranks.

    Raises:
        RunError: if rank 0 cannot be reached, or a rank does not connect to it within ``limit``.
    """
    global _running
    if len(hosts) == 1 or _running is not None:
        return
    if rank == 0:
        peers = _accept_all(hosts, limit, broadcast)
    else:
        port, secret = broadcast(None)
        to_rank_0 = channel.connect(
            port,
            secret,
            index=rank,
            source=f"rank {rank}",
            target=f"rank 0 on {hosts[0]}",
            timeout=min(limit, channel.HANDSHAKE_SECONDS),
        )
        peers = [_Peer(0, hosts[0], to_rank_0)]
    _running = Heartbeat(f"rank {rank} on {hosts[rank]}", peers, limit=limit)
    atexit.register(stop)


def stop() -> None:
    """Stop watching, if this process does."""
    global _running
    if _running is not None:
        _running.stop()
        _running = None


def _accept_all(hosts: Sequence[str], limit: float, broadcast: Callable[[Any], Any]) -> list[_Peer]:
    """Rank 0's peers, once all have connected."""
    arrived: queue.SimpleQueue[tuple[int, Channel]] = queue.SimpleQueue()
    server = channel.Server(lambda rank, opened: arrived.put((rank, opened)), backlog=len(hosts))
    found: dict[int, _Peer] = {}
    try:
        broadcast((server.port, server.secret))
        deadline = time.monotonic() + limit
        while len(found) < len(hosts) - 1:
            rank, opened = arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            found[rank] = _Peer(rank, hosts[rank], opened)
    except queue.Empty:
        missing = min(set(range(1, len(hosts))) - set(found))
        raise RunError(
            f"rank {missing} on {hosts[missing]} did not connect to rank 0 on {hosts[0]} "
            f"within {limit:g} s."
        ) from None
    finally:
        server.close()
    return list(found.values())
