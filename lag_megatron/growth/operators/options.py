"""Checks of operators' options."""

import re
from typing import Any

from lag_megatron.config.schema.ranges import MAX_LAYERS
from lag_megatron.errors import PlanError

_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)


def whole_number(operator: str, name: str, value: Any) -> int:
    """``value`` as an int; YAML's true and 2.0 are refused."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"operator {operator!r}: {name} must be a whole number (got {value!r}).")
    return value


def scale_of(operator: str, value: Any) -> float:
    """``value`` as the factor on a new layer's branches, from 0 to 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise PlanError(
            f"operator {operator!r}: scale must be a number from 0 to 1 (got {value!r})."
        )
    return float(value)


def layer_list(operator: str, name: str, value: Any, *, source_layers: int) -> list[int]:
    """Old layers, 0-based, given as a list of whole numbers or as text like ``0-23,8-31``.

    Raises:
        PlanError: for anything else, and for layers that the source does not have.
    """
    if isinstance(value, str):
        layers = _parse_ranges(operator, name, value)
    elif isinstance(value, list | tuple):
        layers = [whole_number(operator, f"each item of {name}", item) for item in value]
    else:
        raise PlanError(
            f"operator {operator!r}: {name} must be a list of layers or text like '0-3,2-5' "
            f"(got {value!r})."
        )
    for layer in layers:
        if not 0 <= layer < source_layers:
            raise PlanError(
                f"operator {operator!r}: {name} names layer {layer}, but the source's layers are "
                f"0 to {source_layers - 1} (0-based)."
            )
    return layers


def _parse_ranges(operator: str, name: str, text: str) -> list[int]:
    layers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise PlanError(
                f"operator {operator!r}: {name} must be rising ranges of layers, both ends "
                f"included, like '0-3,2-5' or '0,1,1' (got {part.strip()!r} in {text!r})."
            )
        if last >= MAX_LAYERS:
            raise PlanError(
                f"operator {operator!r}: {name} names layer {last:,}, but models have at most "
                f"{MAX_LAYERS:,}."
            )
        layers += range(first, last + 1)
    return layers
