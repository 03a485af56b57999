"""Threads that fill one file together, though its checksum has to be made front to back.

Each takes the next piece, makes and writes it, and waits until everything before it is hashed.
Pieces cost about the same, so nobody waits long.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
Work = Callable[[T], Callable[[], None]]


class Relay(Generic[T]):
    """Pieces that several threads work on at once, and finish one after the other.

    Args:
        pieces: taken by one thread at a time, in order.
    """

    def __init__(self, pieces: Iterator[T]) -> None:
        self._pieces = enumerate(pieces)
        self._taking = threading.Lock()
        self._turn = threading.Condition()
        self._finished = 0
        self._is_broken = False

    def run(self, work: Work[T]) -> None:
        """Work until no piece is left, or until another thread has failed, which raises there.

        Args:
            work: does what may be done at any time, and returns what has to wait for its turn.
        """
        try:
            while (taken := self._take()) is not None:
                number, piece = taken
                finish = work(piece)
                if not self._wait(number):
                    return
                finish()
                self._pass_on()
        except BaseException:
            with self._turn:
                self._is_broken = True
                self._turn.notify_all()
            raise

    def _take(self) -> tuple[int, T] | None:
        with self._taking:
            return None if self._is_broken else next(self._pieces, None)

    def _wait(self, number: int) -> bool:
        """Whether it is a piece's turn at last; False when it never will be."""
        with self._turn:
            self._turn.wait_for(lambda: self._is_broken or self._finished == number)
            return not self._is_broken

    def _pass_on(self) -> None:
        with self._turn:
            self._finished += 1
            self._turn.notify_all()
