"""Authenticated connections for messages between rank 0 and other ranks.

Rank 0 starts a `Server`.  Its port and secret reach the other ranks over a process group, and each
of them calls `connect`.  What goes over a connection:

    client to server    the secret (32 bytes), then the client's index (4 bytes, big-endian)
    server to client    one byte: accepted
    both directions     messages, each with its length, as `multiprocessing.connection` writes them

A client without the secret costs the server one thread for at most 30 s and 32 bytes that it reads.
Messages are bytes; nothing is pickled.

Why no library is used: `torch.distributed.TCPStore` was examined.  It does not tell a client that
another one has died, its calls have no time limit against a rank 0 that is frozen, it has no
authentication, and it cannot push a message to a client.
"""

import hmac
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from lag_megatron.errors import RunError

HANDSHAKE_SECONDS = 30.0
_SECRET_BYTES = 32
_INDEX = struct.Struct("!I")
_ACCEPTED = b"\1"
_FRAME_HEADER_BYTES = 4  # what Connection writes before a message
_RETRY_SECONDS = 0.1


class Channel:
    """An accepted connection.  Several threads may send; one may receive.

    `select` and `poll` report it as readable when at least one byte of a message is there, not only
    its length, so a message of one byte can then be received without waiting.
    """

    def __init__(self, opened: socket.socket) -> None:
        opened.settimeout(None)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _FRAME_HEADER_BYTES + 1)
        self._connection = Connection(opened.detach())
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The file descriptor, for selectors."""
        return self._connection.fileno()

    def send(self, message: bytes) -> None:
        """Send a message of at least one byte.

        Raises:
            OSError: if the connection is lost or closed, or would block and may not.
        """
        with self._sending:
            self._connection.send_bytes(message)

    def receive(self) -> bytes:
        """The next message.

        Raises:
            EOFError: if the other side has closed the connection or has died.
            OSError: if the connection is lost or closed, or would block and may not.
        """
        return self._connection.recv_bytes()

    def poll(self) -> bool:
        """Whether a message, or the end of the connection, is there."""
        return self._connection.poll()

    def close(self) -> None:
        """Close the connection; the thread that receives calls this."""
        with self._sending:  # a descriptor that is closed during a send may already be a file's
            self._connection.close()


class Server:
    """A listening socket that accepts clients which send its secret.

    Args:
        on_connect: called with a client's index and channel, in a thread of this client's own.
        backlog: connections that may wait until they are accepted.
    """

    def __init__(self, on_connect: Callable[[int, Channel], object], *, backlog: int = 512) -> None:
        self.secret = secrets.token_bytes(_SECRET_BYTES)
        self._on_connect = on_connect
        self._socket = _listen(backlog)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        threading.Thread(target=self._accept, daemon=True, name="channel server").start()

    @property
    def port(self) -> int:
        """The port that clients connect to, on all addresses of this host."""
        return int(self._socket.getsockname()[1])

    @property
    def channels(self) -> list[Channel]:
        """All clients' channels; a client's is among them before its `connect` returns."""
        with self._lock:
            return list(self._channels)

    def close(self) -> None:
        """Accept nobody else; channels stay open."""
        self._closed.set()
        self._socket.shutdown(socket.SHUT_RDWR)  # close alone would not end a waiting accept
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                opened, _ = self._socket.accept()
            except OSError:  # closed, or no file descriptor is left for now
                if self._closed.wait(_RETRY_SECONDS):
                    return
                continue
            # A thread of its own, so that a client that sends nothing keeps no other one waiting.
            threading.Thread(target=self._serve, args=(opened,), daemon=True).start()

    def _serve(self, opened: socket.socket) -> None:
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        with opened:  # what Channel has taken over stays open
            try:
                if not hmac.compare_digest(_read(opened, _SECRET_BYTES, deadline), self.secret):
                    return
                (index,) = _INDEX.unpack(_read(opened, _INDEX.size, deadline))
                with self._lock:
                    opened.sendall(_ACCEPTED)
                    channel = Channel(opened)
                    self._channels.append(channel)
            except OSError:
                return
        self._on_connect(index, channel)


def connect(
    port: int,
    secret: bytes,
    *,
    index: int,
    source: str,
    target: str = "rank 0",
    timeout: float = HANDSHAKE_SECONDS,
) -> Channel:
    """Connect to rank 0's server at ``MASTER_ADDR``.

    Args:
        port: of the server.
        secret: of the server.
        index: what the server knows this client by.
        source: this client, for the error's text.
        target: the server, for the error's text.
        timeout: seconds for the connection and again for the handshake.

    Raises:
        RunError: if the server cannot be reached or does not accept the secret.
    """
    host = os.environ["MASTER_ADDR"]
    try:
        with socket.create_connection((host, port), timeout=timeout) as opened:
            opened.sendall(secret + _INDEX.pack(index))
            _read(opened, len(_ACCEPTED), time.monotonic() + timeout)
            return Channel(opened)
    except OSError as error:
        raise RunError(
            f"{source} cannot reach {target} at {host}, port {port}: {error}. "
            "Ranks need each other's ports above 1024 open; MASTER_ADDR must be rank 0's host."
        ) from None


def _listen(backlog: int) -> socket.socket:
    """A socket at a port that the system chooses, over IPv4 and, where there is any, IPv6."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
        )
    return socket.create_server(("", 0), backlog=backlog)


def _read(opened: socket.socket, size: int, deadline: float) -> bytes:
    """Exactly ``size`` bytes.

    Raises:
        OSError: if the other side closes the connection or the deadline passes.
    """
    received = b""
    while len(received) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        opened.settimeout(left)
        chunk = opened.recv(size - len(received))
        if not chunk:
            raise ConnectionError("the connection was closed before it was accepted")
        received += chunk
    return received
