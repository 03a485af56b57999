"""Checks that a plan fits a model, by the names and shapes of its parameters."""

from collections.abc import Mapping

from lag_megatron.checkpoint.families.layer_stack import LayerStack
from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.errors import PlanError
from lag_megatron.growth.plan import GrowthPlan


def layers_of(shapes: Mapping[str, Shape], stack: LayerStack | None) -> dict[int, dict[str, Shape]]:
    """Shapes of each layer's parameters, by the part of the name after the layer's number."""
    layers: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if stack and (match := stack.match(name)):
            layers.setdefault(match.layer, {})[match.tail] = shape
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


def check_layers(
    plan: GrowthPlan, shapes: Mapping[str, Shape], stack: LayerStack | None
) -> Mapping[str, Shape]:
    """Shapes of any layer's parameters, by the part of the name after the layer's number.

    Raises:
        PlanError: if there is another number of layers, or they are not alike.
    """
    layers = layers_of(shapes, stack)
    check_number(plan, layers)
    different = [n for n, tensors in layers.items() if tensors != layers[0]]
    if stack and different:
        raise PlanError(
            f"layer {different[0]} has other parameters than layer 0 in {stack.title}: only models "
            "whose layers are alike can be grown in depth. If another list is that of the layers, "
            "say so in a names file (--names FILE, names=, growth.names), e.g. "
            'layers: "decoder.layers.{}"'
        )
    return layers.get(0, {})
