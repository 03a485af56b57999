"""Threads that fill one file together, though its checksum has to be made front to back.

Each takes the next piece, makes and writes it, and leaves the hashing to whoever comes to it once
everything before is hashed; so it goes on, as far as it has room for another piece.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
Work = Callable[[T], Callable[[], None]]


class OrderedPool(Generic[T]):
    """Pieces that several threads work on at once, and that are finished one after the other.

    Args:
        pieces: taken by one thread at a time, in order.
    """

    def __init__(self, pieces: Iterator[T]) -> None:
        self._pieces = enumerate(pieces)
        self._taking = threading.Lock()
        self._turn = threading.Condition()
        self._left: dict[int, Callable[[], None]] = {}
        self._finished = 0
        self._is_finishing = self._is_broken = False

    def run(self, works: Sequence[Work[T]]) -> None:
        """Work until no piece is left, or until another thread has failed, which raises there.

        A thread comes back when all that it has taken is finished.

        Args:
            works: one for each piece that a thread may have begun; a work does what may be done at
                any time and returns what has to wait for its turn, before which it is not called
                again.
        """
        last = [-1] * len(works)
        try:
            while (free := self._free(last)) is not None and (taken := self._take()) is not None:
                last[free], piece = taken
                self._leave(last[free], works[free](piece))
            with self._turn:  # what the thread's works have in hand may be used again after this
                self._turn.wait_for(lambda: self._is_broken or max(last) < self._finished)
        except BaseException:
            with self._turn:
                self._is_broken = True
                self._turn.notify_all()
            raise

    def _free(self, last: Sequence[int]) -> int | None:
        """Which of the works may be called again, once there is one; None when one has failed."""
        with self._turn:
            self._turn.wait_for(lambda: self._is_broken or min(last) < self._finished)
            if self._is_broken:
                return None
            return next(n for n, number in enumerate(last) if number < self._finished)

    def _take(self) -> tuple[int, T] | None:
        with self._taking:
            return next(self._pieces, None)

    def _leave(self, number: int, finish: Callable[[], None]) -> None:
        """Finish what can be by now, unless another thread is about it."""
        with self._turn:
            self._left[number] = finish
            if self._is_finishing:
                return
            self._is_finishing = True
        while (ready := self._next()) is not None:
            ready()
            with self._turn:
                self._finished += 1
                self._turn.notify_all()

    def _next(self) -> Callable[[], None] | None:
        with self._turn:
            ready = self._left.pop(self._finished, None)
            self._is_finishing = ready is not None
            return ready
