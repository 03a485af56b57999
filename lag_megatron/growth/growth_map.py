"""Growth maps: the source of every value in a grown training state, as data.

A growth map covers every grown parameter by disjoint boxes.  Each box has a source for the weights
and for both moments: a box of an old parameter, a constant, or a random init.  Names and shapes are
those of unsharded parameters, whatever the topology.  For example, of some parameters::

    parameter of the grown model          fp32                       exp_avg     exp_avg_sq
    last, scale 0.5, 2 to 3 layers
    layers.1.mlp.linear_fc2.weight        Copy(layers.1)             Copy        Copy
    layers.2.mlp.linear_fc1.weight        Copy(layers.1)             Copy        Copy
    layers.2.mlp.linear_fc2.weight        Copy(layers.1, scale 0.5)  Copy        Copy
    random_top, 2 to 3 layers
    layers.2.mlp.linear_fc2.weight        Normal(std 0.00816)        Constant 0  Copy(layers.1)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lag_megatron.checkpoint.families.layer_stack import (
    LayerName,
    LayerStack,
    find_layer_stack,
    largest_stack,
)
from lag_megatron.checkpoint.families.roles import ModelRoles
from lag_megatron.checkpoint.state.box import Box, Shape, full_box
from lag_megatron.checkpoint.state.optimizer_states import STATES, AdamState
from lag_megatron.errors import PlanError
from lag_megatron.growth.identity_init import IdentityInit, identity_init_of
from lag_megatron.growth.operators.layer_map import LayerMap, LayerOrigin
from lag_megatron.growth.plan import GrowthPlan, MomentPolicy
from lag_megatron.growth.required_roles import roles_for
from lag_megatron.growth.validate import check_layers, check_number, layers_of
from lag_megatron.growth.weight_init import Constant, Normal, WeightInit, initial_weights


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of an old parameter, from the corner ``low`` on, times ``scale``."""

    parameter: str
    low: Shape
    scale: float = 1.0


ValueSource = Copy | WeightInit


@dataclass(frozen=True, slots=True)
class ParamBlock:
    """A box of a grown parameter, and the source of its values by role."""

    box: Box
    sources: Mapping[AdamState, ValueSource]


@dataclass(frozen=True, slots=True)
class GrowthMap:
    """Blocks of every parameter of the grown model, and the parameters' order.

    Attributes:
        groups: names and shapes of the grown parameters by parameter group, in flat order.
        blocks: by grown parameter, frozen ones included; they cover it and do not overlap.
        frozen: names and shapes of the grown parameters that are not trained; only ``fp32`` of
            their blocks is used.
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
    others: Iterable[str] = (),
) -> GrowthMap:
    """The map of any plan.

    Args:
        plan: the growth plan; ``identity`` allows models without layers, or with unequal ones.
        groups: names and unsharded shapes of the old trained parameters by parameter group.
        frozen: those of the old parameters that are not trained.
        query_groups: of the model's attention, if known.
        others: names of buffers and further names of parameters, which the plan's names may match.

    Raises:
        PlanError: if the plan does not fit the old model.
    """
    if plan.operator != "identity":
        return depth_map(plan, groups, frozen=frozen, query_groups=query_groups, others=others)
    shapes = _all_shapes(groups, frozen)
    if stack := largest_stack(shapes, plan.names):
        check_number(plan, layers_of(shapes, stack))
    roles_for(plan, shapes, stack, others=others)
    return identity_map(groups, frozen=frozen)


def identity_map(
    groups: Sequence[Mapping[str, Shape]], *, frozen: Mapping[str, Shape] | None = None
) -> GrowthMap:
    """The map that copies every parameter, as resharding does."""
    shapes = _all_shapes(groups, frozen or {})
    blocks = {name: (_copy_all(name, shape),) for name, shape in shapes.items()}
    return GrowthMap(groups, blocks, frozen or {})


def depth_map(
    plan: GrowthPlan,
    groups: Sequence[Mapping[str, Shape]],
    *,
    frozen: Mapping[str, Shape] | None = None,
    query_groups: int | None = None,
    others: Iterable[str] = (),
) -> GrowthMap:
    """The map of a plan that changes the list of layers.

    Args:
        plan: the growth plan.
        groups: names and unsharded shapes of the old trained parameters by parameter group.
        frozen: those of the old parameters that are not trained; a new layer's are frozen where its
            source's are.
        query_groups: of the model's attention, if known.
        others: names of buffers and further names of parameters, which the plan's names may match.

    Raises:
        PlanError: if the old model has another number of layers, unequal layers, unknown roles that
            the plan asks for, or none of the parameters that it changes.
    """
    shapes_of_all = _all_shapes(groups, frozen or {})
    stack = find_layer_stack(shapes_of_all, plan.names)
    layer = check_layers(plan, shapes_of_all, stack)
    roles = roles_for(plan, shapes_of_all, stack, untrained=frozen or (), others=others)
    layer_blocks = _LayerBlocks(plan, roles, identity_init_of(plan, layer, roles, query_groups))
    blocks: dict[str, tuple[ParamBlock, ...]] = {}

    def grow(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        grown: dict[str, Shape] = {}
        for name, old, origin in grown_names(list(shapes), plan.layer_map, stack):
            grown[name] = shapes[old]
            block = _copy_all(old, shapes[old])
            if origin is not None:
                block = layer_blocks.block(name, block, old, origin)
            blocks[name] = (block,)
        return grown

    grown_groups = [grow(group) for group in groups]
    return GrowthMap(grown_groups, blocks, grow(frozen or {}))


def grown_names(
    names: Sequence[str], layer_map: LayerMap, stack: LayerStack | None
) -> Iterator[tuple[str, str, LayerOrigin | None]]:
    """The grown model's names in order, each with the old name it continues and its layer's origin.

    Parameters of layers have to be contiguous, as they are in a model's registration order.
    """
    matches = [stack.match(name) if stack else None for name in names]
    inside = [i for i, match in enumerate(matches) if match]
    if stack is None or not inside:
        yield from ((name, name, None) for name in names)
        return
    first, last = inside[0], inside[-1]
    by_layer: dict[int, list[LayerName]] = {}
    for match in matches[first : last + 1]:
        if match is None:
            raise PlanError("the names of the layers' parameters do not stand together.")
        by_layer.setdefault(match.layer, []).append(match)
    yield from ((name, name, None) for name in names[:first])
    for layer, origin in enumerate(layer_map):
        for match in by_layer.get(origin.source, ()):  # a layer may be wholly frozen, or trained
            yield stack.name(layer, match.tail), stack.name(match.layer, match.tail), origin
    yield from ((name, name, None) for name in names[last + 1 :])


def moment_policy(plan: GrowthPlan, origin: LayerOrigin) -> MomentPolicy:
    """The moment policy of a new layer.

    ``auto`` copies for duplicates.  It borrows (second moments alone) where weights or outputs of
    branches are not the source layer's: the direction of its gradients means nothing there, but
    their size does.  It is ``zero`` for the layers of staged training with ``zero_norms``, as in
    the paper (Shen et al. 2022, arXiv 2203.06211), whose schedule warms the rate up again: without
    that, v = 0 under a large step count makes the first updates (1 - beta1) / sqrt(1 - beta2) times
    the rate.  Adafactor has no first moment, so ``copy`` and ``borrow`` are the same for it; after
    ``zero`` its first update is clipped to the usual size.
    """
    if plan.moments != "auto":
        return plan.moments
    if origin.zero_norms:
        return "zero"
    return "copy" if origin.init == "duplicate" and origin.branch_scale > 0 else "borrow"


@dataclass(frozen=True)
class _LayerBlocks:
    """The blocks of the parameters of the grown model's layers."""

    plan: GrowthPlan
    roles: ModelRoles
    identity_init: IdentityInit | None

    def block(self, name: str, kept: ParamBlock, old: str, origin: LayerOrigin) -> ParamBlock:
        """The block of a parameter, given the copy of the old one that it continues."""
        norm = self.roles.post_norm_branch(self._tail(old))
        if norm in origin.identity_norms:
            one = 0.0 if self.roles.of(old) == "norm_weight_zero_centred" else 1.0
            plain: ValueSource = Constant(0.0 if self.roles.of(old) == "bias" else one)
            return ParamBlock(kept.box, dict.fromkeys(STATES, Constant(0.0)) | {"fp32": plain})
        weights = self._weights(name, kept.box.shape, old, origin)
        sources: dict[AdamState, ValueSource] = {**kept.sources, "fp32": weights}
        is_handed_over = norm is not None and bool(origin.identity_norms)
        if origin.is_new and not is_handed_over:
            policy = moment_policy(self.plan, origin)
            if policy in ("zero", "borrow"):
                sources["exp_avg"] = Constant(0.0)
            if policy == "zero":
                sources["exp_avg_sq"] = Constant(0.0)
        return ParamBlock(kept.box, sources)

    def _weights(self, name: str, shape: Shape, old: str, origin: LayerOrigin) -> ValueSource:
        source: Copy | Normal | Constant = Copy(old, (0,) * len(shape))
        if self.identity_init and origin.zero_norms:
            drawn = self._drawn(name, shape, old)
            return self.identity_init.weights(self._tail(old), drawn) or source
        if origin.is_new and origin.init == "random":
            source = self._drawn(name, shape, old) or source
        return _scaled(source, origin.branch_scale) if self.roles.is_branch_output(old) else source

    def _drawn(self, name: str, shape: Shape, old: str) -> Normal | Constant | None:
        plan, role = self.plan, self.roles.of(old)
        assert role is not None, f"{old}: asked for without a known role"
        return initial_weights(
            role,
            name,
            shape,
            num_layers=plan.target_layers,
            init_std=plan.init_std,
            key=f"growth/{plan.seed}/{plan.source_layers}-{plan.target_layers}",
        )

    def _tail(self, name: str) -> str:
        match = self.roles.stack.match(name) if self.roles.stack else None
        assert match, f"{name}: in no layer"
        return match.tail


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
