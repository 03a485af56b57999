"""How probe groups talk to the coordinator: rank 0 answers each leader in a thread of its own.

Messages go over sockets of their own, opened with a secret of this event, so groups wait for nobody
but the coordinator.  A group that dies, or loses rank 0, is noticed at once.
"""

import contextlib
import os
import queue
import secrets
import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol

from lag_megatron.distributed.heartbeat import listen
from lag_megatron.distributed.world import World
from lag_megatron.errors import RunError
from lag_megatron.run.signals import StopFlag, Stopped
from lag_megatron.search.coordinator import Coordinator
from lag_megatron.search.event import Assignment, ProbeResult

_POLL_SECONDS = 0.5
_HELLO_SECONDS = 30.0


class Desk(Protocol):
    """What a group's leader asks of the coordinator."""

    def ask(self, holds: int | None) -> Assignment:
        """The next turn."""

    def needs_checkpoint(self, progress: ProbeResult) -> bool:
        """Whether a state has to be saved."""

    def record(self, progress: ProbeResult) -> None:
        """Write down how far a candidate has come."""

    def stop(self, reason: str) -> None:
        """End all groups."""


class _Near:
    """The coordinator in this process."""

    def __init__(self, coordinator: Coordinator, flag: StopFlag) -> None:
        self._coordinator, self._flag = coordinator, flag

    def ask(self, holds: int | None) -> Assignment:
        return self._coordinator.ask(0, holds, stopped=lambda: _reason(self._flag))

    def needs_checkpoint(self, progress: ProbeResult) -> bool:
        return self._coordinator.needs_checkpoint(progress)

    def record(self, progress: ProbeResult) -> None:
        self._coordinator.record(0, progress)

    def stop(self, reason: str) -> None:
        self._coordinator.stop(reason)


class _Far:
    """The coordinator on another rank."""

    def __init__(self, line: Connection, flag: StopFlag) -> None:
        self._line, self._flag = line, flag
        self._over = False
        self._answers: queue.Queue[tuple[Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True, name="desk").start()

    def ask(self, holds: int | None) -> Assignment:
        turn: Assignment = self._call("ask", holds)
        return turn

    def needs_checkpoint(self, progress: ProbeResult) -> bool:
        return bool(self._call("needs_checkpoint", progress))

    def record(self, progress: ProbeResult) -> None:
        self._call("record", progress)

    def stop(self, reason: str) -> None:
        self._over = True
        self._call("stop", reason)

    def _call(self, name: str, argument: Any) -> Any:
        answer, told = None, False
        with contextlib.suppress(OSError):
            self._line.send((name, argument))
            while True:
                with contextlib.suppress(queue.Empty):
                    answer = self._answers.get(timeout=_POLL_SECONDS)
                    break
                if name == "ask" and self._flag.asked and not told:
                    told = True  # the coordinator then answers the question with the stop
                    self._line.send(("signalled", _reason(self._flag)))
        if answer is None:
            raise RunError(
                "the coordinator on rank 0 is gone. The same command goes on from what it has "
                "written down."
            )
        return answer[0]

    def _listen(self) -> None:
        """Answers go to whoever waits; word of a stop goes to the flag at once."""
        try:
            while True:
                kind, value = self._line.recv()
                if kind == "stop":
                    self._flag.ask(value)
                else:
                    # After the last turn the other side closes.
                    self._over |= isinstance(value, Assignment) and value.candidate is None
                    self._answers.put((value,))
        except (EOFError, OSError):
            self._answers.put(None)
            if not self._over:
                self._flag.ask("the coordinator on rank 0 is gone")


class _Line:
    """A connection that several threads may send on."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._sending = threading.Lock()

    def send(self, kind: str, value: Any) -> None:
        with self._sending:
            self.connection.send((kind, value))


class _Counter:
    """Rank 0's side: a listening socket and a thread for each other group's leader.

    Attributes:
        failure: what went wrong here while a group was answered; it ends the run.
    """

    def __init__(self, coordinator: Coordinator, flag: StopFlag, secret: bytes) -> None:
        self._coordinator, self._flag, self._secret = coordinator, flag, secret
        self._socket = listen()
        self._lines: list[_Line] = []
        self.failure: Exception | None = None
        coordinator.on_stop = self._tell_all
        threading.Thread(target=self._accept, daemon=True, name="desk").start()

    @property
    def port(self) -> int:
        """Where leaders connect to."""
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Nobody else is expected."""
        self._socket.close()

    def _tell_all(self, reason: str) -> None:
        """Let every group stop at its next step."""
        self._flag.ask(reason)
        for line in self._lines:
            with contextlib.suppress(OSError):  # a group that is gone needs no word
                line.send("stop", reason)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection = Connection(self._socket.accept()[0].detach())
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """Answer one leader until its work is over."""
        group: int | None = None
        try:
            if not connection.poll(_HELLO_SECONDS) or (
                connection.recv_bytes(len(self._secret)) != self._secret
            ):
                return  # somebody who knocks at ports
            line = _Line(connection)
            self._lines.append(line)
            group = connection.recv()
            line.send("answer", None)
            self._answer_all(group, line)
        except (EOFError, OSError):
            if group is not None:
                self._coordinator.stop(f"probe group {group} is gone")
        finally:
            connection.close()

    def _answer_all(self, group: int, line: _Line) -> None:
        over = False
        while not over:
            name, argument = line.connection.recv()
            if name == "signalled":  # came as the question was being answered
                self._coordinator.stop(argument)
                continue
            try:
                answer = self._answer(group, name, argument, line.connection)
            except Exception as error:  # rank 0's own trouble, raised there when its group ends
                self.failure = self.failure or error
                self._coordinator.stop(f"the coordinator failed: {error}")
                raise EOFError from error
            over = name == "stop" or (name == "ask" and answer.candidate is None)
            line.send("answer", answer)

    def _answer(self, group: int, name: str, argument: Any, connection: Connection) -> Any:
        def signalled() -> str:
            return str(connection.recv()[1]) if connection.poll() else ""

        coordinator = self._coordinator
        if name == "ask":
            return coordinator.ask(group, argument, stopped=signalled)
        if name == "record":
            return coordinator.record(group, argument)
        return (
            coordinator.needs_checkpoint(argument)
            if name == "needs_checkpoint"
            else coordinator.stop(argument)
        )


@contextlib.contextmanager
def desk_of(
    world: World, group: World, coordinator: Coordinator | None, flag: StopFlag
) -> Iterator[Desk | None]:
    """The desk for this rank's group: None on ranks that are no leader.  Collective.

    Args:
        world: all ranks.
        group: this rank's group.
        coordinator: on rank 0.
        flag: set when the coordinator wants all groups to stop.

    Raises:
        RunError: if a leader cannot reach rank 0.
        Exception: on rank 0, what went wrong while it answered another group.
    """
    many = group.size < world.size
    secret = world.broadcast(secrets.token_bytes(32))
    counter = _Counter(coordinator, flag, secret) if coordinator and many else None
    port = world.broadcast(counter.port if counter else None)
    desks: list[Desk] = [_Near(coordinator, flag)] if coordinator else []

    def connect() -> None:
        if group.is_coordinator and not coordinator:
            line = _connected(port, secret, world.rank // group.size)
            desks.append(_Far(line, flag))

    try:
        world.from_each(connect)  # rank 0 listens until the last one has come
        yield desks[0] if desks else None
    except Stopped:
        if counter and counter.failure:
            raise counter.failure from None
        raise
    finally:
        if counter:
            counter.close()


def _connected(port: int, secret: bytes, group: int) -> Connection:
    address = os.environ["MASTER_ADDR"], port
    try:
        opened = socket.create_connection(address, timeout=_HELLO_SECONDS)
        opened.settimeout(None)  # from here on an answer may take as long as it takes
        line = Connection(opened.detach())
        line.send_bytes(secret)
        line.send(group)
        line.recv()
    except (OSError, EOFError) as error:
        raise RunError(
            f"probe group {group} cannot reach rank 0 at {address[0]}, port {port}: {error}. Ranks "
            "need each other's ports above 1024 open."
        ) from None
    return line


def _reason(flag: StopFlag) -> str:
    return flag.why if flag.asked else ""
