"""Checks that a plan fits a model, by the names and shapes of its parameters."""

from collections.abc import Mapping

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.param_names import LAYER
from lag_megatron.errors import PlanError
from lag_megatron.growth.operators.layer_map import Branch
from lag_megatron.growth.plan import GrowthPlan

# Parts of the names of the projections back into the residual stream, and of the norms of a
# post-LN layer.
BRANCH_OUTPUTS = (".self_attention.linear_proj.", ".mlp.linear_fc2.")
POST_NORMS: Mapping[Branch, str] = {
    "attention": ".post_attn_layernorm.",
    "mlp": ".post_mlp_layernorm.",
}


def layers_of(shapes: Mapping[str, Shape]) -> dict[int, dict[str, Shape]]:
    """Shapes of each layer's parameters, by the part of the name after the layer's number."""
    layers: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if match := LAYER.match(name):
            layers.setdefault(int(match["layer"]), {})[match["tail"]] = shape
    return layers


def check_number(plan: GrowthPlan, layers: Mapping[int, object]) -> None:
    """Check that a model has the plan's number of layers.

    Raises:
        PlanError: if it has not.
    """
    if sorted(layers) != list(range(plan.source_layers)):
        raise PlanError(
            f"the checkpoint has {len(layers)} layers, but the plan grows from "
            f"{plan.source_layers}. Give a plan for {len(layers)} layers."
        )


def check_layers(plan: GrowthPlan, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Shapes of any layer's parameters, by the part of the name after the layer's number.

    Raises:
        PlanError: if there is another number of layers, they are not alike, or they have none of
            the parameters that the plan changes.
    """
    layers = layers_of(shapes)
    check_number(plan, layers)
    different = [n for n, tensors in layers.items() if tensors != layers[0]]
    if different:
        raise PlanError(
            f"layer {different[0]} has other parameters than layer 0: only models whose layers "
            "are alike can be grown in depth."
        )
    layer = layers.get(0, {})
    _check_names(plan, layer)
    return layer


def _check_names(plan: GrowthPlan, layer: Mapping[str, Shape]) -> None:
    """Check that layers have the parameters that a plan changes."""
    needed: dict[str, str] = {}
    if any(origin.branch_scale != 1 for origin in plan.layer_map):
        needed |= dict.fromkeys(BRANCH_OUTPUTS, "it scales layers that are named as Megatron does")
    if any(origin.identity_norms for origin in plan.layer_map):
        needed |= dict.fromkeys(POST_NORMS.values(), "it is for post-LN models")
    for part, reason in needed.items():
        if not any(part in tail for tail in layer):
            raise PlanError(
                f"operator {plan.operator!r} needs layers with {part.strip('.')}, but this model's "
                f"have none: {reason}. Take another operator."
            )
