"""What each element of a grown training state is made of, as data.

A growth map covers every parameter of the grown model by disjoint boxes.  Each box says, for the
weights, for the mean of the gradient and for that of its square, whether it is copied from a box of
an old parameter, a constant, or freshly drawn.  Names and shapes are those of whole parameters,
whatever the topology.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lag_megatron.checkpoint.state.box import Box, Shape, full_box
from lag_megatron.checkpoint.state.optimizer_states import STATES, Role
from lag_megatron.checkpoint.state.param_names import LAYER
from lag_megatron.errors import PlanError
from lag_megatron.growth.identity_init import IdentityInit, identity_init_of
from lag_megatron.growth.operators.layer_map import LayerMap, LayerOrigin
from lag_megatron.growth.plan import GrowthPlan, MomentPolicy
from lag_megatron.growth.validate import (
    BRANCH_OUTPUTS,
    POST_NORMS,
    check_layers,
    check_number,
    layers_of,
)
from lag_megatron.growth.weight_init import Constant, Normal, WeightInit, megatron_init


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of an old parameter, from corner ``low``, times ``scale``."""

    parameter: str
    low: Shape
    scale: float = 1.0


ValueSource = Copy | WeightInit


@dataclass(frozen=True, slots=True)
class ParamBlock:
    """A box of a grown parameter and where its values come from."""

    box: Box
    sources: Mapping[Role, ValueSource]


@dataclass(frozen=True, slots=True)
class GrowthMap:
    """Blocks of every parameter of the grown model, and the parameters' order.

    Attributes:
        groups: names and shapes of the grown parameters by parameter group, in flat order.
        blocks: by grown parameter, frozen ones included; they cover it and do not overlap.
        frozen: names and shapes of the grown parameters that are not trained; of their blocks only
            ``fp32`` is ever asked for.
    """

    groups: Sequence[Mapping[str, Shape]]
    blocks: Mapping[str, tuple[ParamBlock, ...]]
    frozen: Mapping[str, Shape] = field(default_factory=dict)


def growth_map_of(
    plan: GrowthPlan,
    groups: Sequence[Mapping[str, Shape]],
    frozen: Mapping[str, Shape],
    *,
    query_groups: int | None = None,
) -> GrowthMap:
    """The map of any plan.

    Args:
        plan: what to do; ``identity`` takes models without layers, and layers that differ.
        groups: names and whole shapes of the old trained parameters by parameter group.
        frozen: those of the old parameters that are not trained.
        query_groups: of the model's attention, if known.

    Raises:
        PlanError: if the plan does not fit the old model.
    """
    if plan.operator != "identity":
        return depth_map(plan, groups, frozen=frozen, query_groups=query_groups)
    if layers := layers_of(_all_shapes(groups, frozen)):
        check_number(plan, layers)
    return identity_map(groups, frozen=frozen)


def identity_map(
    groups: Sequence[Mapping[str, Shape]], *, frozen: Mapping[str, Shape] | None = None
) -> GrowthMap:
    """The map that keeps everything: what saving under another topology needs."""
    shapes = _all_shapes(groups, frozen or {})
    blocks = {name: (_copy_all(name, shape),) for name, shape in shapes.items()}
    return GrowthMap(groups, blocks, frozen or {})


def depth_map(
    plan: GrowthPlan,
    groups: Sequence[Mapping[str, Shape]],
    *,
    frozen: Mapping[str, Shape] | None = None,
    query_groups: int | None = None,
) -> GrowthMap:
    """The map of a plan that changes the list of layers.

    Args:
        plan: what to do.
        groups: names and whole shapes of the old trained parameters by parameter group.
        frozen: those of the old parameters that are not trained; a new layer's are frozen where its
            source's are.
        query_groups: of the model's attention, if known.

    Raises:
        PlanError: if the old model has another number of layers, layers that differ, or none of the
            parameters that the plan changes.
    """
    layer = check_layers(plan, _all_shapes(groups, frozen or {}))
    silence = identity_init_of(plan, layer, query_groups)
    blocks: dict[str, tuple[ParamBlock, ...]] = {}

    def grow(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        grown: dict[str, Shape] = {}
        for name, old, origin in grown_names(list(shapes), plan.layer_map):
            grown[name] = shapes[old]
            blocks[name] = (_block(plan, name, shapes[old], old, origin, silence),)
        return grown

    grown_groups = [grow(group) for group in groups]
    return GrowthMap(grown_groups, blocks, grow(frozen or {}))


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
    heads = sorted({match["head"] for match in matches if match})
    if len(heads) > 1:
        raise PlanError(
            f"the model has {len(heads)} stacks of layers ({', '.join(heads)}); only models with "
            "one can be grown in depth."
        )
    first, last = inside[0], inside[-1]
    by_layer: dict[int, list[re.Match[str]]] = {}
    for match in matches[first : last + 1]:
        if match is None:
            raise PlanError("the names of the layers' parameters do not stand together.")
        by_layer.setdefault(int(match["layer"]), []).append(match)
    yield from ((name, name, None) for name in names[:first])
    for layer, origin in enumerate(layer_map):
        for match in by_layer.get(origin.source, ()):  # a layer may be wholly frozen, or trained
            yield f"{match['head']}{layer}{match['tail']}", match[0], origin
    yield from ((name, name, None) for name in names[last + 1 :])


def moment_policy(plan: GrowthPlan, origin: LayerOrigin) -> MomentPolicy:
    """The moment policy of a new layer.

    ``auto`` copies for duplicates and borrows where the weights, or what their branches put out,
    are not the source layer's: its gradients' direction means nothing there, their size does.
    It is ``zero`` for the silent layers of staged training, as in its paper (Shen et al. 2022,
    arXiv 2203.06211), whose schedule warms the rate up again: without that, v = 0 under a large
    step count makes their first updates (1 - beta1) / sqrt(1 - beta2) times the rate.
    Adafactor knows no direction, so for it ``copy`` and ``borrow`` are the same.  After ``zero``
    its first update is not too large, as AdamW's would be: it is clipped to the usual size.
    """
    if plan.moments != "auto":
        return plan.moments
    if origin.silent:
        return "zero"
    return "copy" if origin.init == "duplicate" and origin.branch_scale > 0 else "borrow"


def _block(
    plan: GrowthPlan,
    name: str,
    shape: Shape,
    old: str,
    origin: LayerOrigin | None,
    silence: IdentityInit | None,
) -> ParamBlock:
    kept = _copy_all(old, shape)
    if origin is None:
        return kept
    norm = next((branch for branch, part in POST_NORMS.items() if part in name), None)
    if norm in origin.plain_norms:
        plain: ValueSource = Constant(1.0 if name.endswith(".weight") else 0.0)
        return ParamBlock(kept.box, dict.fromkeys(STATES, Constant(0.0)) | {"fp32": plain})
    weights = _weights(plan, name, shape, old, origin, silence)
    sources: dict[Role, ValueSource] = {**kept.sources, "fp32": weights}
    is_handed_over = norm is not None and bool(origin.plain_norms)
    if origin.is_new and not is_handed_over:
        policy = moment_policy(plan, origin)
        if policy in ("zero", "borrow"):
            sources["exp_avg"] = Constant(0.0)
        if policy == "zero":
            sources["exp_avg_sq"] = Constant(0.0)
    return ParamBlock(kept.box, sources)


def _weights(
    plan: GrowthPlan,
    name: str,
    shape: Shape,
    old: str,
    origin: LayerOrigin,
    silence: IdentityInit | None,
) -> ValueSource:
    source: Copy | Normal | Constant = Copy(old, (0,) * len(shape))
    drawn = megatron_init(
        name,
        num_layers=plan.target_layers,
        init_std=plan.init_std,
        key=f"growth/{plan.seed}/{plan.source_layers}-{plan.target_layers}",
    )
    if silence and origin.silent:
        return silence.weights(name, drawn) or source
    if origin.is_new and origin.init == "random":
        source = drawn
    is_branch_output = any(part in name for part in BRANCH_OUTPUTS)
    return _scaled(source, origin.branch_scale) if is_branch_output else source


def _scaled(source: Copy | Normal | Constant, scale: float) -> ValueSource:
    if scale == 1.0:
        return source
    if scale == 0.0:  # exact: a product would turn some zeros into -0.0
        return Constant(0.0)
    if isinstance(source, Copy):
        return replace(source, scale=source.scale * scale)
    if isinstance(source, Normal):
        return replace(source, std=source.std * scale)
    return Constant(source.value * scale)


def _copy_all(name: str, shape: Shape) -> ParamBlock:
    return ParamBlock(full_box(shape), dict.fromkeys(STATES, Copy(name, (0,) * len(shape))))


def _all_shapes(
    groups: Sequence[Mapping[str, Shape]], frozen: Mapping[str, Shape]
) -> dict[str, Shape]:
    return {name: shape for group in (*groups, frozen) for name, shape in group.items()}
