"""Checks of the values of a configuration as YAML gives them, wherever they stand."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lag_megatron.config.schema.ranges import MAX_INTEGER

# NUL, and halves of surrogate pairs, which neither files nor paths can hold.
_IMPOSSIBLE = re.compile(r"[\x00\ud800-\udfff]")


def value_problems(value: Any, where: str = "") -> Iterator[str]:
    """Numbers that are not finite or too large, and text that no file name or key can have.

    Args:
        value: a configuration, or a part of one.
        where: its dotted path.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            path = f"{where}.{key}".removeprefix(".")
            if isinstance(key, str):
                yield from value_problems(inner, path)
            else:
                yield f"{path}: a key must be text (got {key!r}). Put it in quotes."
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from value_problems(inner, f"{where}.{number}".removeprefix("."))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: must be a finite number (got {value})."
    elif isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
        yield f"{where}: must lie within 64 bits (got a number of {value.bit_length()} bits)."
    elif isinstance(value, str) and _IMPOSSIBLE.search(value):
        yield f"{where}: no name or path has such characters (got {value!r}). Remove them."
