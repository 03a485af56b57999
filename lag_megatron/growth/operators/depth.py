"""Operators that add layers."""

from typing import Any

from lag_megatron.errors import PlanError
from lag_megatron.growth.layer_map import LayerMap, lag_layer_map


def lag(
    source_layers: int, target_layers: int, *, index: Any, block_size: Any, init: Any
) -> LayerMap:
    """One operator of LAG's design space (Karp et al. 2024, section 3)."""
    for name, value in (("index", index), ("block_size", block_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise PlanError(f"operator 'lag': {name} must be a whole number (got {value!r}).")
    if init not in ("duplicate", "random"):
        raise PlanError(f"operator 'lag': init must be duplicate or random (got {init!r}).")
    return lag_layer_map(
        source_layers, target_layers, index=index, block_size=block_size, init=init
    )


def last(source_layers: int, target_layers: int) -> LayerMap:
    """Last, or gradual, stacking: a copy of the last n layers on top (Reddi et al. 2023)."""
    new = target_layers - source_layers
    return lag_layer_map(
        source_layers, target_layers, index=source_layers - new, block_size=new, init="duplicate"
    )


def random_top(source_layers: int, target_layers: int) -> LayerMap:
    """Fresh layers on top, the paper's nearest to loss preserving (Karp et al. 2024)."""
    new = target_layers - source_layers
    return lag_layer_map(
        source_layers, target_layers, index=source_layers - new, block_size=new, init="random"
    )
