"""Numbers as the report writes them, and how many of them."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

NONE = "-"


def plural(number: int, word: str) -> str:
    """``1 tie``, ``2 ties``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def integer(value: int | None) -> str:
    """With commas; a dash for None."""
    return NONE if value is None else f"{value:,}"


def loss(value: float | None) -> str:
    """Nats to four decimals."""
    return fixed(value, 4)


def fixed(value: float | None, digits: int) -> str:
    """With that many decimals; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


def evenly_thinned(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` items at equal distances, the last one always among them."""
    every = max(1, -(-len(items) // most))
    return list(items[::-1][::every][::-1])
