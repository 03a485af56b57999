"""A progress bar for work that is measured in bytes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of ``total`` bytes, on a terminal only.

    Yields a function that adds a number of bytes; several threads may call it.
    """
    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:

        def add(count: int) -> None:
            with lock:
                bar.update(count)

        yield add
