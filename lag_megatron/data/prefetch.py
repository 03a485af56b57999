"""The next batches, made by a thread while the device computes."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls ``make`` in a thread, one number before its result is needed.

    ``make`` must depend on the number alone; its exceptions are raised by :meth:`take` and
    :meth:`each` in place of its result.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[T]] | None = None

    def take(self, number: int) -> T:
        """``make(number)``; starts ``make(number + 1)``."""
        if self._next is None or self._next[0] != number:
            self._next = (number, self._thread.submit(self._make, number))
        made = self._next[1].result()
        self._next = (number + 1, self._thread.submit(self._make, number + 1))
        return made

    def each(self, count: int) -> Iterator[T]:
        """``make`` of 0 to ``count`` - 1 in turn, and of none beyond."""
        following = self._thread.submit(self._make, 0) if count else None
        for number in range(count):
            assert following is not None
            made = following.result()
            if number + 1 < count:
                following = self._thread.submit(self._make, number + 1)
            yield made
