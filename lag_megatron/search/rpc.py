"""Questions of probe groups to the coordinator on rank 0, and its answers.

Each group's leader has a connection of its own to rank 0, which answers it in a thread of its own,
so a group waits for the coordinator but never for another group.  The death of a group, or of rank
0, is noticed at once.  Messages are JSON objects:

    leader to rank 0    {"call": name, "argument": ...}   a question
                        {"signal": reason}                a signal came while it waits
    rank 0 to leader    {"answer": ..., "last": bool}     to the question; both close after the last
                        {"stop": reason}                  at any time: all groups end
"""

import contextlib
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Protocol

from lag_megatron.distributed import channel
from lag_megatron.distributed.channel import Channel
from lag_megatron.distributed.world import World
from lag_megatron.errors import RunError
from lag_megatron.run.signals import StopFlag, Stopped
from lag_megatron.search.coordinator import Coordinator
from lag_megatron.search.event import Assignment, ProbeResult

_POLL_SECONDS = 0.5


class CoordinatorClient(Protocol):
    """What a group's leader asks of the coordinator."""

    def ask(self, loaded_candidate: int | None) -> Assignment:
        """The next assignment."""

    def needs_checkpoint(self, result: ProbeResult) -> bool:
        """Whether the state of the candidate has to be saved."""

    def record(self, result: ProbeResult) -> None:
        """Write a result to the journal."""

    def stop(self, reason: str) -> None:
        """End all groups."""


class LocalClient:
    """A client of the coordinator in this process: the leader of group 0."""

    def __init__(self, coordinator: Coordinator, flag: StopFlag) -> None:
        self._coordinator, self._flag = coordinator, flag

    def ask(self, loaded_candidate: int | None) -> Assignment:
        """The next assignment."""
        return self._coordinator.ask(0, loaded_candidate, stopped=lambda: _reason(self._flag))

    def needs_checkpoint(self, result: ProbeResult) -> bool:
        """Whether the state of the candidate has to be saved."""
        return self._coordinator.needs_checkpoint(result)

    def record(self, result: ProbeResult) -> None:
        """Write a result to the journal."""
        self._coordinator.record(0, result)

    def stop(self, reason: str) -> None:
        """End all groups."""
        self._coordinator.stop(reason)


class RemoteClient:
    """A client of the coordinator on another rank.

    Args:
        connection: to a `CoordinatorServer`.
        flag: set when the coordinator stops all groups, or is lost.

    All calls raise a RunError when the coordinator is lost.
    """

    def __init__(self, connection: Channel, flag: StopFlag) -> None:
        self._connection, self._flag = connection, flag
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()  # None: lost
        threading.Thread(target=self._receive, daemon=True, name="coordinator client").start()

    def ask(self, loaded_candidate: int | None) -> Assignment:
        """The next assignment."""
        return Assignment(**self._call("ask", loaded_candidate))

    def needs_checkpoint(self, result: ProbeResult) -> bool:
        """Whether the state of the candidate has to be saved."""
        return bool(self._call("needs_checkpoint", asdict(result)))

    def record(self, result: ProbeResult) -> None:
        """Write a result to the journal."""
        self._call("record", asdict(result))

    def stop(self, reason: str) -> None:
        """End all groups."""
        self._call("stop", reason)

    def _call(self, name: str, argument: Any) -> Any:
        with contextlib.suppress(OSError):  # the receiving thread then ends too
            _send(self._connection, {"call": name, "argument": argument})
        signal_sent = False
        while True:
            with contextlib.suppress(queue.Empty):
                answer = self._answers.get(timeout=_POLL_SECONDS)
                break
            if name == "ask" and self._flag.asked and not signal_sent:
                signal_sent = True  # the coordinator then answers the question with the stop
                with contextlib.suppress(OSError):
                    _send(self._connection, {"signal": _reason(self._flag)})
        if answer is None:
            self._answers.put(None)  # for later calls
            raise RunError(
                "the coordinator on rank 0 is gone. The same command goes on from what it has "
                "written down."
            )
        return answer["answer"]

    def _receive(self) -> None:
        """Pass answers to the waiting call, and a stop to the flag, at once."""
        try:
            while True:
                message = json.loads(self._connection.receive())
                if "stop" in message:
                    self._flag.ask(message["stop"])
                    continue
                self._answers.put(message)
                if message["last"]:
                    return
        except (EOFError, OSError):
            self._flag.ask("the coordinator on rank 0 is gone")
        finally:
            self._answers.put(None)
            self._connection.close()


class CoordinatorServer:
    """Rank 0's side: answers the leaders of all other groups, each in a thread of its own.

    Attributes:
        failure: the first error of the coordinator while it answered a group; it ends the run.
    """

    def __init__(self, coordinator: Coordinator, flag: StopFlag) -> None:
        self._coordinator, self._flag = coordinator, flag
        self.failure: Exception | None = None
        self._server = channel.Server(self._serve)
        coordinator.on_stop = self._stop_all

    @property
    def address(self) -> tuple[int, bytes]:
        """The port and the secret that leaders connect with."""
        return self._server.port, self._server.secret

    def close(self) -> None:
        """Accept nobody else; those that are connected are still answered."""
        self._server.close()

    def _stop_all(self, reason: str) -> None:
        """Let every group stop at its next step."""
        self._flag.ask(reason)
        for connection in self._server.channels:
            with contextlib.suppress(OSError):  # a group that is gone has nothing to stop
                _send(connection, {"stop": reason})

    def _serve(self, group: int, connection: Channel) -> None:
        """Answer one leader until its work is over."""
        last = False
        try:
            while not last:
                message = json.loads(connection.receive())
                if "signal" in message:  # came after its question had been answered
                    self._coordinator.stop(message["signal"])
                    continue
                try:
                    answer, last = self._answer(group, message, connection)
                except Exception as error:  # raised again on rank 0 when its own group ends
                    self.failure = self.failure or error
                    self._coordinator.stop(f"the coordinator failed: {error}")
                    return
                _send(connection, {"answer": answer, "last": last})
        except (EOFError, OSError):
            self._coordinator.stop(_gone(group))
        finally:
            connection.close()

    def _answer(self, group: int, message: dict[str, Any], connection: Channel) -> tuple[Any, bool]:
        """The answer to a question, and whether it is the last one for this group."""

        def signalled() -> str:
            try:
                return str(json.loads(connection.receive())["signal"]) if connection.poll() else ""
            except (EOFError, OSError):
                return _gone(group)

        coordinator, argument = self._coordinator, message["argument"]
        match message["call"]:
            case "ask":
                assignment = coordinator.ask(group, argument, stopped=signalled)
                return asdict(assignment), assignment.candidate is None
            case "needs_checkpoint":
                return coordinator.needs_checkpoint(_probe_result(argument)), False
            case "record":
                coordinator.record(group, _probe_result(argument))
                return None, False
            case "stop":
                coordinator.stop(argument)
                return None, True
            case unknown:
                raise AssertionError(f"unknown call {unknown}")


@contextlib.contextmanager
def connect(
    world: World, group: World, coordinator: Coordinator | None, flag: StopFlag
) -> Iterator[CoordinatorClient | None]:
    """The client of this rank's group: None on ranks that do not lead one.  Collective.

    Args:
        world: all ranks.
        group: this rank's group.
        coordinator: on rank 0.
        flag: set when the coordinator stops all groups.

    Raises:
        RunError: if a leader cannot reach rank 0.
        Exception: on rank 0, what went wrong while it answered another group.
    """
    several = group.size < world.size
    server = CoordinatorServer(coordinator, flag) if coordinator and several else None
    address = world.broadcast(server.address if server else None)
    clients: list[CoordinatorClient] = [LocalClient(coordinator, flag)] if coordinator else []

    def connect_leader() -> None:
        if group.is_coordinator and not coordinator:
            number = world.rank // group.size
            port, secret = address
            opened = channel.connect(port, secret, index=number, source=f"probe group {number}")
            clients.append(RemoteClient(opened, flag))

    try:
        world.run_on_all_ranks(connect_leader)  # rank 0 accepts until the last one has connected
        yield clients[0] if clients else None
    except Stopped:
        if server and server.failure:
            raise server.failure from None
        raise
    finally:
        if server:
            server.close()


def _send(connection: Channel, message: dict[str, Any]) -> None:
    connection.send(json.dumps(message).encode())


def _probe_result(fields: dict[str, Any]) -> ProbeResult:
    """From JSON, which has lists where the dataclass has tuples."""
    tuples: dict[str, Any] = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
    return ProbeResult(**fields | tuples)


def _gone(group: int) -> str:
    return f"probe group {group} is gone"


def _reason(flag: StopFlag) -> str:
    return flag.why if flag.asked else ""
