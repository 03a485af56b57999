"""The growth operators, by name.

An operator turns two numbers of layers and its options into a layer map.  No tensor is opened, so
an operator that cannot be applied is refused before any work.
"""

import inspect
from collections.abc import Callable, Mapping

from lag_megatron.errors import PlanError
from lag_megatron.growth.operators.depth import (
    g_stack,
    identity,
    interpolate,
    lag,
    last,
    midas,
    progressive,
    random_top,
    slices,
)
from lag_megatron.growth.operators.inserted import llama_pro, post_ln_identity, staged
from lag_megatron.growth.operators.layer_map import LayerMap

OPERATORS: Mapping[str, Callable[..., LayerMap]] = {
    "identity": identity,
    "lag": lag,
    "last": last,
    "random_top": random_top,
    "progressive": progressive,
    "g_stack": g_stack,
    "midas": midas,
    "interpolate": interpolate,
    "slices": slices,
    "llama_pro": llama_pro,
    "post_ln_identity": post_ln_identity,
    "staged": staged,
}


def layer_map_of(
    operator: str, source_layers: int, target_layers: int, options: Mapping[str, object]
) -> LayerMap:
    """Apply a named operator.

    Raises:
        PlanError: for an unknown operator, unknown or missing options, or an impossible growth.
    """
    if operator not in OPERATORS:
        raise PlanError(f"unknown operator {operator!r}. Known: {', '.join(OPERATORS)}.")
    function = OPERATORS[operator]
    parameters = [
        p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    known = {p.name for p in parameters}
    needed = {p.name for p in parameters if p.default is p.empty}
    if unknown := set(options) - known:
        raise PlanError(
            f"operator {operator!r} has no option {', '.join(sorted(map(str, unknown)))}. "
            f"Its options: {', '.join(sorted(known)) or 'none'}."
        )
    if missing := needed - set(options):
        raise PlanError(f"operator {operator!r} needs the option {', '.join(sorted(missing))}.")
    return function(source_layers, target_layers, **options)
