"""Numbers that come from outside: whole or finite, and within a range."""

import math
from typing import Any

from lag_megatron.errors import LagError

# The largest that files and kernels hold, and limits beyond which a number can only be a mistake.
MAX_INTEGER = 2**63 - 1
MAX_SEED = 2**64 - 1
MAX_LAYERS = 10_000
MAX_RANKS = 1_000_000
MAX_SECONDS = 100_000_000  # three years; timers overflow far beyond it
MAX_SEQ_LENGTH = 2**24
MAX_VOCAB_SIZE = 2**31 - 1
MAX_WORKERS = 10_000


def require_whole(
    value: Any, where: str, *, error: type[LagError], least: int = 0, most: int = MAX_INTEGER
) -> int:
    """``value``, a whole number from ``least`` to ``most``; true and 2.0 are none.

    Args:
        value: what was given.
        where: what the message begins with, like the option's name.
        error: the kind of error to raise.
        least: the smallest that is allowed.
        most: the largest that is allowed.

    Raises:
        LagError: of the kind ``error``, for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = f"of {least:,} or more" if most == MAX_INTEGER else f"from {least:,} to {most:,}"
        raise error(f"{where}: expected a whole number {limit} (got {value!r}).")
    return value


def require_positive(value: Any, where: str, *, error: type[LagError]) -> float:
    """``value``, a finite number above 0.

    Args:
        value: what was given.
        where: what the message begins with, like the option's name.
        error: the kind of error to raise.

    Raises:
        LagError: of the kind ``error``, for anything else.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise error(f"{where}: expected a finite number above 0 (got {value!r}).")
    return float(value)
