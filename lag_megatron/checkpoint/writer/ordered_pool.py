"""Threads that fill one file together, although its checksum has to be made front to back.

Each thread takes the next piece, makes and writes it, and leaves a function that hashes it.  Those
functions are called in the order of the pieces, by whichever thread finds the next one ready.  A
thread with two buffers goes on while one of its pieces waits.  Four pieces, of which piece 0 takes
long::

    thread A   make 0 ......................  hash 0  hash 1  hash 2
    thread B   make 1   make 2   wait ...............   make 3   hash 3

Thread B waits when both its buffers hold pieces that are not hashed; the buffer of piece 1 is free
as soon as thread A has hashed it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
MakeFn = Callable[[T], Callable[[], None]]


class OrderedPool(Generic[T]):
    """Pieces that several threads make in any order, and that are finished in their own order.

    Args:
        pieces: an iterator that is advanced by one thread at a time.
    """

    def __init__(self, pieces: Iterator[T]) -> None:
        self._pieces = enumerate(pieces)
        self._pieces_lock = threading.Lock()
        self._changed = threading.Condition()
        self._made: dict[int, Callable[[], None]] = {}  # waiting to be finished, by piece
        self._finished = 0
        self._is_finishing = self._has_failed = False

    def run(self, makers: Sequence[MakeFn[T]]) -> None:
        """Work until no piece is left, or until another thread has failed.

        Every thread calls this with its own ``makers``.  It returns when all pieces that the
        thread has taken are finished, so that their buffers may be used again.

        Args:
            makers: one for each piece that the thread may have unfinished, with its own buffers.
                A maker does what may be done in any order and returns the function that finishes
                the piece; it is called again after that function has been.

        Raises:
            Exception: whatever a maker, or the finishing of a piece, raises in this thread.
        """
        last = [-1] * len(makers)  # the piece that each maker has made last
        try:
            while (free := self._wait_for_free(last)) is not None:
                if (taken := self._take()) is None:
                    break
                last[free], piece = taken
                self._finish_ready(last[free], makers[free](piece))
            with self._changed:
                self._changed.wait_for(lambda: self._has_failed or max(last) < self._finished)
        except BaseException:
            with self._changed:
                self._has_failed = True
                self._changed.notify_all()
            raise

    def _wait_for_free(self, last: Sequence[int]) -> int | None:
        """The number of a maker whose last piece is finished; None when a thread has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_failed or min(last) < self._finished)
            if self._has_failed:
                return None
            return next(n for n, number in enumerate(last) if number < self._finished)

    def _take(self) -> tuple[int, T] | None:
        with self._pieces_lock:
            return next(self._pieces, None)

    def _finish_ready(self, number: int, finish: Callable[[], None]) -> None:
        """Finish every piece whose turn it is, unless another thread is doing so."""
        with self._changed:
            self._made[number] = finish
            if self._is_finishing:
                return
            self._is_finishing = True
        while (ready := self._next_ready()) is not None:
            ready()
            with self._changed:
                self._finished += 1
                self._changed.notify_all()

    def _next_ready(self) -> Callable[[], None] | None:
        with self._changed:
            ready = self._made.pop(self._finished, None)
            self._is_finishing = ready is not None
            return ready
