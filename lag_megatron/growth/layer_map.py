"""Layer maps: for each layer of the grown model, the old layer it comes from and whether it is new.

The design space is the one of Karp et al. 2024 (arXiv 2406.02469, section 3): one set of
``n = target - source`` consecutive old layers is expanded into ``2n`` layers.  Indices are 0-based:
``index`` is the number of old layers before the set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lag_megatron.errors import PlanError

Init = Literal["duplicate", "random"]


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where a layer of the grown model comes from.

    ``source`` is the old layer whose place it continues; a new layer with ``init == "random"``
    takes no weights from it, but may borrow its second moments.
    """

    source: int
    is_new: bool
    init: Init = "duplicate"


LayerMap = tuple[LayerOrigin, ...]


def lag_layer_map(
    source_layers: int, target_layers: int, *, index: int, block_size: int, init: Init
) -> LayerMap:
    """The map of one LAG operator.

    After each old block of ``block_size`` layers, within the set that starts at ``index``, comes
    its new block: ``block_size = 1`` interleaves, ``block_size = n`` puts n new layers after n old.

    Raises:
        PlanError: if the operator does not exist for these numbers of layers.
    """
    new_layers = _check_lag(source_layers, target_layers, index=index, block_size=block_size)
    return tuple(_lag_origins(source_layers, new_layers, index, block_size, init))


def feasible_indices(source_layers: int, target_layers: int) -> range:
    """Every index at which a set of ``target - source`` old layers starts."""
    new_layers = _check_depth(source_layers, target_layers)
    return range(source_layers - new_layers + 1)


def feasible_block_sizes(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """Every divisor of ``target - source``, rising."""
    new_layers = _check_depth(source_layers, target_layers)
    return tuple(size for size in range(1, new_layers + 1) if new_layers % size == 0)


def draw(layer_map: LayerMap) -> str:
    """One line, layers 1-based: ``1 2 1* 2* 3`` (``*`` duplicate, ``R`` random)."""
    return " ".join(
        "R" if o.is_new and o.init == "random" else f"{o.source + 1}{'*' if o.is_new else ''}"
        for o in layer_map
    )


def _lag_origins(
    source_layers: int, new_layers: int, index: int, block_size: int, init: Init
) -> Iterator[LayerOrigin]:
    for layer in range(source_layers + new_layers):
        if layer < index:
            yield LayerOrigin(layer, is_new=False)
        elif layer < index + 2 * new_layers:
            pair, within = divmod(layer - index, 2 * block_size)
            is_new = within >= block_size
            source = index + pair * block_size + within - (block_size if is_new else 0)
            yield LayerOrigin(source, is_new, init if is_new else "duplicate")
        else:
            yield LayerOrigin(layer - new_layers, is_new=False)


def _check_depth(source_layers: int, target_layers: int) -> int:
    new_layers = target_layers - source_layers
    if source_layers < 1 or new_layers < 1:
        raise PlanError(
            f"cannot grow {source_layers} layers to {target_layers}: the target must have more "
            "layers than the source."
        )
    if new_layers > source_layers:
        raise PlanError(
            f"cannot grow {source_layers} layers to {target_layers} in one event: LAG expands "
            f"{new_layers} old layers, but there are {source_layers}. Largest target: "
            f"{2 * source_layers}; go on from there in a further stage."
        )
    return new_layers


def _check_lag(source_layers: int, target_layers: int, *, index: int, block_size: int) -> int:
    new_layers = _check_depth(source_layers, target_layers)
    last = source_layers - new_layers
    if not 0 <= index <= last:
        raise PlanError(
            f"index {index} is out of range for {source_layers} -> {target_layers} layers: a set "
            f"of {new_layers} layers starts at 0 to {last} (0-based)."
        )
    if block_size < 1 or new_layers % block_size:
        allowed = ", ".join(map(str, feasible_block_sizes(source_layers, target_layers)))
        raise PlanError(
            f"block_size {block_size} does not divide the {new_layers} new layers of "
            f"{source_layers} -> {target_layers}. Allowed: {allowed}."
        )
    return new_layers
