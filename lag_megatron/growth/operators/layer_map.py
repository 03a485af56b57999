"""Layer maps: for each layer of the grown model, the old layer it comes from and whether it is new.

LAG's design space is the one of Karp et al. 2024 (arXiv 2406.02469, section 3): one set of
``n = target - source`` consecutive old layers is expanded into ``2n`` layers.  Indices are 0-based:
``index`` is the number of old layers before the set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lag_megatron.checkpoint.families.family import Branch
from lag_megatron.errors import PlanError

Init = Literal["duplicate", "random", "identity"]


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where a layer of the grown model comes from.

    Attributes:
        source: the old layer that it continues; a new layer with ``init == "random"`` copies no
            weights from it, but may borrow its second moments.
        is_new: whether the layer is an addition, to which the moment policy applies.
        init: where a new layer's weights come from; ``identity`` makes its matrices pieces of the
            identity matrix.
        branch_scale: factor on the outputs of the attention and MLP branches, that is on weights
            and biases of the two projections back into the residual stream.  0 makes a pre-LN layer
            the identity (Gesmundo and Maile 2023, arXiv 2308.06103), values between 0 and 1 are
            scaled duplication (Agarwal et al. 2024, arXiv 2403.04978).
        identity_norms: norms of a post-LN layer that become the identity (weight 1, bias 0) without
            moments.  The layer's other norm is an old one that has moved, moments included.
        zero_norms: whether a new pre-LN layer is the identity because the inputs of its branches
            are 0: norms with weight and bias 0, and no bias anywhere (Shen et al. 2022, arXiv
            2203.06211).
    """

    source: int
    is_new: bool
    init: Init = "duplicate"
    branch_scale: float = 1.0
    identity_norms: tuple[Branch, ...] = ()
    zero_norms: bool = False

    @property
    def is_identity_branch(self) -> bool:
        """Whether both branches output zeros, so that a pre-LN layer is the identity."""
        return self.zero_norms or self.branch_scale == 0


LayerMap = tuple[LayerOrigin, ...]


def lag_layer_map(
    source_layers: int,
    target_layers: int,
    *,
    index: int,
    block_size: int,
    init: Init,
    branch_scale: float = 1.0,
) -> LayerMap:
    """The map of one LAG operator.

    After each old block of ``block_size`` layers, within the set that starts at ``index``, comes
    its new block: ``block_size = 1`` interleaves, ``block_size = n`` puts n new layers after n old.

    Raises:
        PlanError: if the operator does not exist for these numbers of layers.
    """
    new_layers = _check_lag(source_layers, target_layers, index=index, block_size=block_size)
    new = LayerOrigin(0, is_new=True, init=init, branch_scale=branch_scale)
    return tuple(_lag_origins(source_layers, new_layers, index, block_size, new))


def map_of_sources(sources: Sequence[int], *, branch_scale: float = 1.0) -> LayerMap:
    """The map of a list of old layers: the first mention of one is old, later ones are new."""
    return tuple(
        LayerOrigin(source, is_new=True, branch_scale=branch_scale)
        if source in sources[:place]
        else LayerOrigin(source, is_new=False)
        for place, source in enumerate(sources)
    )


def require_more_layers(source_layers: int, target_layers: int) -> int:
    """The number of new layers.

    Raises:
        PlanError: if there are none.
    """
    new_layers = target_layers - source_layers
    if source_layers < 1 or new_layers < 1:
        raise PlanError(
            f"cannot grow {source_layers} layers to {target_layers}: the target must have more "
            "layers than the source."
        )
    return new_layers


def feasible_indices(source_layers: int, target_layers: int) -> range:
    """Every index at which a set of ``target - source`` old layers starts."""
    new_layers = _check_depth(source_layers, target_layers)
    return range(source_layers - new_layers + 1)


def feasible_block_sizes(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """Every divisor of ``target - source``, in increasing order."""
    new_layers = _check_depth(source_layers, target_layers)
    return tuple(size for size in range(1, new_layers + 1) if new_layers % size == 0)


def keeps_old_norms(layer_map: LayerMap) -> bool:
    """Whether no old norm changes, as function preserving growth of a pre-LN model needs."""
    return not any(o.identity_norms or (o.zero_norms and not o.is_new) for o in layer_map)


def moves_second_norm(layer_map: LayerMap) -> bool:
    """Whether each old layer's second norm moves to the last of the new layers after it.

    All norms before it are then the identity.  With branches that output zeros, this keeps the
    function of a post-LN model.
    """
    followers: tuple[LayerOrigin | None, ...] = (*layer_map[1:], None)
    base: int | None = None
    for origin, follower in zip(layer_map, followers, strict=False):
        base = base if origin.is_new else origin.source
        plain = {"attention"} if origin.is_new else set()
        if follower is not None and follower.is_new:
            plain.add("mlp")
        handed = set(origin.identity_norms) == plain and not origin.zero_norms
        if not handed or (origin.source, origin.init) != (base, "duplicate"):
            return False
    return True


def format_layer_map(layer_map: LayerMap) -> str:
    """One line, layers 1-based: ``1 2 1* 2* 3`` (``*`` duplicate, ``R`` random).

    ``2z`` and ``Rz`` are new layers whose branches output zeros, ``2*0.5`` is a duplicate whose
    branches are halved.  ``I`` is a layer of staged training with zero norms and identity matrices,
    ``2i`` one with the matrices of layer 2.
    """
    return " ".join(map(_format_layer, layer_map))


def _format_layer(origin: LayerOrigin) -> str:
    if origin.zero_norms:
        return "I" if origin.init == "identity" else f"{origin.source + 1}i"
    is_random = origin.is_new and origin.init == "random"
    name = "R" if is_random else str(origin.source + 1)
    if origin.branch_scale == 0:
        return f"{name}z"
    if origin.branch_scale != 1:
        return f"{name}*{origin.branch_scale:g}"
    return f"{name}*" if origin.is_new and not is_random else name


def _lag_origins(
    source_layers: int, new_layers: int, index: int, block_size: int, new: LayerOrigin
) -> Iterator[LayerOrigin]:
    for layer in range(source_layers + new_layers):
        if layer < index:
            yield LayerOrigin(layer, is_new=False)
        elif layer < index + 2 * new_layers:
            pair, within = divmod(layer - index, 2 * block_size)
            source = index + pair * block_size + within % block_size
            is_new = within >= block_size
            yield replace(new, source=source) if is_new else LayerOrigin(source, is_new=False)
        else:
            yield LayerOrigin(layer - new_layers, is_new=False)


def _check_depth(source_layers: int, target_layers: int) -> int:
    new_layers = require_more_layers(source_layers, target_layers)
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
