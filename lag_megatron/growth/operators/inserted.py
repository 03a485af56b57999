"""Operators that insert identity layers, so that the grown model computes the old function."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lag_megatron.checkpoint.families.family import Branch
from lag_megatron.errors import PlanError
from lag_megatron.growth.operators.depth import require_even_blocks
from lag_megatron.growth.operators.layer_map import (
    Init,
    LayerMap,
    LayerOrigin,
    map_of_sources,
    require_more_layers,
)
from lag_megatron.growth.operators.options import layer_list, whole_number


def llama_pro(source_layers: int, target_layers: int) -> LayerMap:
    """Block expansion (Wu et al. 2024, arXiv 2401.02415, LLaMA Pro), for pre-LN models.

    After each of P = target - source groups of old layers comes a copy of the group's last layer
    whose branches output zeros.
    """
    after = _evenly_spread("llama_pro", source_layers, target_layers)
    sources = sorted([*range(source_layers), *after])
    return map_of_sources(sources, branch_scale=0.0)


def post_ln_identity(source_layers: int, target_layers: int, *, after: Any = None) -> LayerMap:
    """Insertion that keeps the function of a post-LN model.

    A zero-output layer is no identity under post-LN, where its norms act on the residual stream
    (Vaswani et al. 2017: x -> LN(x + f(x))).  Staged training (Shen et al. 2022, arXiv 2203.06211)
    makes such a layer an identity by its norms' weights; here, for new layers N1..Nk after l, the
    affine part of l's second norm moves to Nk's second norm, and all norms between get weight 1 and
    bias 0.  Such a norm changes normalised values only by the order of its eps.

    Option ``after`` lists old layers, 0-based, one per new layer; one that repeats gets several.
    By default they are spread as ``llama_pro`` does.
    """
    if after is None:
        counts = Counter(_evenly_spread("post_ln_identity", source_layers, target_layers))
    else:
        new = require_more_layers(source_layers, target_layers)
        places = layer_list("post_ln_identity", "after", after, source_layers=source_layers)
        if len(places) != new:
            raise PlanError(
                f"operator 'post_ln_identity': after lists {len(places)} layers, but {new} are "
                f"new. Name one old layer for each new one."
            )
        counts = Counter(places)
    return tuple(
        origin for layer in range(source_layers) for origin in _chain(layer, counts[layer])
    )


def staged(
    source_layers: int,
    target_layers: int,
    *,
    placement: Any = "alternate",
    matrices: Any = "identity",
    query_groups: Any = None,
) -> LayerMap:
    """Doubling by layers with zero norms (Shen et al. 2022, arXiv 2203.06211), for pre-LN models.

    A new layer is the identity because the norms before its branches have weight and bias 0, and
    its biases are 0 (details, also of gated MLPs, in ``growth.identity_init``).  ``moments: auto``
    is ``zero`` for it, as in the paper, whose schedule warms the rate up again over 150 to 200
    steps; take ``borrow`` where it does not.

    Option ``placement`` puts a new layer after each old one (``alternate``) or all on top
    (``append``).  Its ``matrices`` are pieces of the ``identity``, or a ``copy`` of the old
    layer's, as in progressive stacking.  ``query_groups`` of the attention is needed for identity
    matrices if the checkpoint does not record it.
    """
    require_more_layers(source_layers, target_layers)
    if target_layers != 2 * source_layers:
        raise PlanError(
            f"operator 'staged' doubles the layers: {source_layers} become {2 * source_layers}, "
            f"not {target_layers}. Give {2 * source_layers} layers, or take 'llama_pro'."
        )
    _one_of("placement", placement, ("alternate", "append"))
    _one_of("matrices", matrices, ("identity", "copy"))
    if query_groups is not None and whole_number("staged", "query_groups", query_groups) < 1:
        raise PlanError(f"operator 'staged': query_groups must be 1 or more (got {query_groups}).")
    old = [LayerOrigin(layer, is_new=False) for layer in range(source_layers)]
    init: Init = "identity" if matrices == "identity" else "duplicate"
    new = [replace(origin, is_new=True, init=init, zero_norms=True) for origin in old]
    if placement == "append":
        return (*old, *new)
    return tuple(origin for pair in zip(old, new, strict=True) for origin in pair)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PlanError(
            f"operator 'staged': {name} must be {' or '.join(allowed)} (got {value!r})."
        )


def _chain(layer: int, new_layers: int) -> Iterator[LayerOrigin]:
    """An old layer and the new ones after it; its second norm moves to the last of them."""
    yield LayerOrigin(layer, is_new=False, identity_norms=("mlp",) if new_layers else ())
    for number in range(1, new_layers + 1):
        plain: tuple[Branch, ...] = ("attention", "mlp") if number < new_layers else ("attention",)
        yield LayerOrigin(layer, is_new=True, branch_scale=0.0, identity_norms=plain)


def _evenly_spread(operator: str, source_layers: int, target_layers: int) -> list[int]:
    """The last layers of ``target - source`` equal groups of old layers."""
    new_layers = require_even_blocks(operator, source_layers, target_layers)
    group = source_layers // new_layers
    return list(range(group - 1, source_layers, group))
