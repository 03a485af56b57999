"""What each element of a grown training state is made of, as data.

A growth map covers every parameter of the grown model by disjoint boxes.  Each box says, for the
weights and for both Adam moments, whether it is copied from a box of an old parameter, a constant,
or freshly drawn.  Names and shapes are those of whole parameters, whatever the topology.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lag_megatron.checkpoint.boxes import Box, Shape, whole
from lag_megatron.checkpoint.layout import State
from lag_megatron.checkpoint.names import LAYER
from lag_megatron.errors import PlanError
from lag_megatron.growth.fresh import Constant, Fresh, megatron_init
from lag_megatron.growth.layer_map import LayerMap, LayerOrigin
from lag_megatron.growth.plan import GrowthPlan, MomentPolicy


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of an old parameter, from corner ``low``, times ``scale``."""

    parameter: str
    low: Shape
    scale: float = 1.0


Source = Copy | Fresh


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a grown parameter and where its values come from."""

    box: Box
    sources: Mapping[State, Source]


@dataclass(frozen=True, slots=True)
class GrowthMap:
    """Blocks of every parameter of the grown model, and the parameters' order.

    Attributes:
        groups: names and shapes of the grown parameters by parameter group, in flat order.
        blocks: by grown parameter; they cover it and do not overlap.
        origins: for each grown parameter the old one whose place in DeepSpeed's lists it takes.
    """

    groups: Sequence[Mapping[str, Shape]]
    blocks: Mapping[str, tuple[Block, ...]]
    origins: Mapping[str, str]


def identity_map(groups: Sequence[Mapping[str, Shape]]) -> GrowthMap:
    """The map that keeps everything: what saving under another topology needs."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    blocks = {name: (_copy_all(name, shape),) for name, shape in shapes.items()}
    return GrowthMap(groups, blocks, {name: name for name in shapes})


def depth_map(plan: GrowthPlan, groups: Sequence[Mapping[str, Shape]]) -> GrowthMap:
    """The map of a plan that changes the list of layers.

    Args:
        plan: what to do.
        groups: names and whole shapes of the old parameters by parameter group.

    Raises:
        PlanError: if the old model has another number of layers, or layers that differ.
    """
    shapes = {name: shape for group in groups for name, shape in group.items()}
    _check_layers(plan, shapes)
    grown_groups: list[dict[str, Shape]] = []
    blocks: dict[str, tuple[Block, ...]] = {}
    origins: dict[str, str] = {}
    for group in groups:
        grown: dict[str, Shape] = {}
        for name, old, origin in grown_names(list(group), plan.layer_map):
            grown[name] = group[old]
            origins[name] = old
            blocks[name] = (_block(plan, name, old, group[old], origin),)
        grown_groups.append(grown)
    return GrowthMap(grown_groups, blocks, origins)


def grown_names(
    names: Sequence[str], layer_map: LayerMap
) -> Iterator[tuple[str, str, LayerOrigin | None]]:
    """The grown model's names in order, each with the old name it continues and its layer's origin.

    Names of layers have to stand together, as they do in a model's registration order.
    """
    matches = [LAYER.match(name) for name in names]
    inside = [i for i, match in enumerate(matches) if match]
    if not inside:
        yield from ((name, name, None) for name in names)
        return
    first, last = inside[0], inside[-1]
    by_layer: dict[int, list[re.Match[str]]] = {}
    for match in matches[first : last + 1]:
        if match is None:
            raise PlanError("the names of the layers' parameters do not stand together.")
        by_layer.setdefault(int(match["layer"]), []).append(match)
    yield from ((name, name, None) for name in names[:first])
    for layer, origin in enumerate(layer_map):
        for match in by_layer[origin.source]:
            yield f"{match['head']}{layer}{match['tail']}", match[0], origin
    yield from ((name, name, None) for name in names[last + 1 :])


def _block(
    plan: GrowthPlan, name: str, old: str, shape: Shape, origin: LayerOrigin | None
) -> Block:
    kept = _copy_all(old, shape)
    if origin is None or not origin.is_new:
        return kept
    sources: dict[State, Source] = dict(kept.sources)
    if origin.init == "random":
        sources["fp32"] = megatron_init(
            name,
            num_layers=plan.target_layers,
            init_std=plan.init_std,
            key=f"growth/{plan.seed}/{plan.source_layers}-{plan.target_layers}",
        )
    policy = moment_policy(plan, origin)
    if policy in ("zero", "borrow"):
        sources["exp_avg"] = Constant(0.0)
    if policy == "zero":
        sources["exp_avg_sq"] = Constant(0.0)
    return Block(kept.box, sources)


def moment_policy(plan: GrowthPlan, origin: LayerOrigin) -> MomentPolicy:
    """The moment policy of a new layer; ``auto`` copies for duplicates, borrows for random."""
    if plan.moments != "auto":
        return plan.moments
    return "copy" if origin.init == "duplicate" else "borrow"


def _copy_all(name: str, shape: Shape) -> Block:
    source = Copy(name, (0,) * len(shape))
    return Block(whole(shape), {"fp32": source, "exp_avg": source, "exp_avg_sq": source})


def _check_layers(plan: GrowthPlan, shapes: Mapping[str, Shape]) -> None:
    layers: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if match := LAYER.match(name):
            layers.setdefault(int(match["layer"]), {})[match["tail"]] = shape
    if sorted(layers) != list(range(plan.source_layers)):
        raise PlanError(
            f"the checkpoint has {len(layers)} layers, but the plan grows from "
            f"{plan.source_layers}. Give a plan for {len(layers)} layers."
        )
    different = [n for n, tensors in layers.items() if tensors != layers[0]]
    if different:
        raise PlanError(
            f"layer {different[0]} has other parameters than layer 0: only models whose layers "
            "are alike can be grown in depth."
        )
