"""Operators that add layers: which old layer each layer of the grown model continues.

Option ``scale`` is the factor on a new layer's branches: 1 copies, values below are the scaled
duplication of Agarwal et al. 2024 (arXiv 2403.04978, the beta of their Nesterov step), and 0 is the
layer whose output projections are zero (Gesmundo and Maile 2023, arXiv 2308.06103).
"""

from typing import Any

from lag_megatron.errors import PlanError
from lag_megatron.growth.operators.layer_map import (
    LayerMap,
    lag_layer_map,
    map_of_sources,
    require_more_layers,
)
from lag_megatron.growth.operators.options import layer_list, scale_of, whole_number


def identity(source_layers: int, target_layers: int) -> LayerMap:
    """Every layer as it is, as in resharding."""
    if source_layers != target_layers or source_layers < 0:
        raise PlanError(
            f"operator 'identity' keeps the number of layers, so {source_layers} cannot become "
            f"{target_layers}. Give {source_layers} layers, or another operator."
        )
    return map_of_sources(range(source_layers))


def lag(
    source_layers: int,
    target_layers: int,
    *,
    index: Any,
    block_size: Any,
    init: Any,
    scale: Any = 1.0,
) -> LayerMap:
    """One operator of LAG's design space (Karp et al. 2024, section 3)."""
    if init not in ("duplicate", "random"):
        raise PlanError(f"operator 'lag': init must be duplicate or random (got {init!r}).")
    return lag_layer_map(
        source_layers,
        target_layers,
        index=whole_number("lag", "index", index),
        block_size=whole_number("lag", "block_size", block_size),
        init=init,
        branch_scale=scale_of("lag", scale),
    )


def last(source_layers: int, target_layers: int, *, scale: Any = 1.0) -> LayerMap:
    """Last, or gradual, stacking: a copy of the last n layers on top (Reddi et al. 2023)."""
    new = target_layers - source_layers
    return lag_layer_map(
        source_layers,
        target_layers,
        index=source_layers - new,
        block_size=new,
        init="duplicate",
        branch_scale=scale_of("last", scale),
    )


def random_top(source_layers: int, target_layers: int, *, scale: Any = 1.0) -> LayerMap:
    """Random layers on top, the paper's nearest to loss preserving (Karp et al. 2024).

    With ``scale=0`` they are the exact identity (Gesmundo and Maile 2023, "layer addition").
    """
    new = target_layers - source_layers
    return lag_layer_map(
        source_layers,
        target_layers,
        index=source_layers - new,
        block_size=new,
        init="random",
        branch_scale=scale_of("random_top", scale),
    )


def midas(source_layers: int, target_layers: int, *, scale: Any = 1.0) -> LayerMap:
    """Middle stacking (Saunshi et al. 2024, arXiv 2409.19044, MIDAS).

    Of ``k = source / n`` blocks of n layers the middle one, ``ceil(k / 2) - 1`` counted from 0, is
    repeated right after itself.
    """
    new = require_even_blocks("midas", source_layers, target_layers)
    blocks = source_layers // new
    return lag_layer_map(
        source_layers,
        target_layers,
        index=new * ((blocks + 1) // 2 - 1),
        block_size=new,
        init="duplicate",
        branch_scale=scale_of("midas", scale),
    )


def progressive(source_layers: int, target_layers: int, *, scale: Any = 1.0) -> LayerMap:
    """Progressive stacking: the whole stack a second time on top (Gong et al. 2019)."""
    require_more_layers(source_layers, target_layers)
    if target_layers != 2 * source_layers:
        raise PlanError(
            f"operator 'progressive' doubles the layers: {source_layers} become "
            f"{2 * source_layers}, not {target_layers}. Give {2 * source_layers} layers, or "
            "another operator."
        )
    sources = 2 * list(range(source_layers))
    return map_of_sources(sources, branch_scale=scale_of("progressive", scale))


def g_stack(source_layers: int, target_layers: int, *, scale: Any = 1.0) -> LayerMap:
    """The whole stack g times, g = target / source (Du et al. 2024, arXiv 2405.15319)."""
    require_more_layers(source_layers, target_layers)
    if target_layers % source_layers:
        below = target_layers // source_layers * source_layers
        nearest = [n for n in (below, below + source_layers) if n > source_layers]
        raise PlanError(
            f"operator 'g_stack' repeats the whole stack: {target_layers} is not a multiple of "
            f"{source_layers} layers. Nearest: {' or '.join(map(str, nearest))}."
        )
    sources = target_layers // source_layers * list(range(source_layers))
    return map_of_sources(sources, branch_scale=scale_of("g_stack", scale))


def interpolate(source_layers: int, target_layers: int, *, scale: Any = 1.0) -> LayerMap:
    """Each layer followed by its copies: layer j continues ``floor(j * source / target)``.

    Stacking "by interpolation", against which Gong et al. 2019 and Du et al. 2024 compare.
    """
    require_more_layers(source_layers, target_layers)
    sources = [layer * source_layers // target_layers for layer in range(target_layers)]
    return map_of_sources(sources, branch_scale=scale_of("interpolate", scale))


def slices(source_layers: int, target_layers: int, *, layers: Any, scale: Any = 1.0) -> LayerMap:
    """A given list of old layers, e.g. SOLAR's ``0-23,8-31`` (Kim et al. 2023, arXiv 2312.15166).

    The first mention of a layer is the old one; layers that are not mentioned are dropped.
    """
    require_more_layers(source_layers, target_layers)
    sources = layer_list("slices", "layers", layers, source_layers=source_layers)
    if len(sources) != target_layers:
        raise PlanError(
            f"operator 'slices': layers lists {len(sources)} layers, but the target has "
            f"{target_layers}. Change the list or the target."
        )
    return map_of_sources(sources, branch_scale=scale_of("slices", scale))


def require_even_blocks(operator: str, source_layers: int, target_layers: int) -> int:
    """The number of new layers, which must divide that of the old ones.

    Raises:
        PlanError: with the targets that are possible.
    """
    new_layers = require_more_layers(source_layers, target_layers)
    if source_layers % new_layers:
        targets = [source_layers + n for n in range(1, source_layers + 1) if source_layers % n == 0]
        raise PlanError(
            f"operator {operator!r}: the {new_layers} new layers of {source_layers} -> "
            f"{target_layers} do not divide the {source_layers} old ones. "
            f"Allowed targets: {', '.join(map(str, targets))}."
        )
    return new_layers
