"""What is said of a checkpoint's layers."""

from collections.abc import Collection, Mapping
from typing import Any

from lag_megatron.checkpoint.families.layer_stack import find_layer_stack, layer_stacks
from lag_megatron.checkpoint.families.roles import find_roles
from lag_megatron.config.schema.param_names import ParamNames


def describe_layers(
    shapes: Mapping[str, Collection[int]], names: ParamNames | None = None
) -> dict[str, Any]:
    """The number of layers and the list that they are in, as plain values.

    Args:
        shapes: of all parameters, whole.
        names: what the user says of them; checked here.

    Returns:
        ``layers``, None where several lists could be meant, and ``layer_stacks``: of each list that
        could be, its ``name`` (``transformer.h.N``) and its number of ``layers``.

    Raises:
        PlanError: if the user's names do not fit the model.
    """
    found = layer_stacks(shapes)
    if names is not None:
        if names.layers is not None:
            stack = find_layer_stack(shapes, names)
            found = [stack] if stack else []
        find_roles(shapes, found[0] if len(found) == 1 else None, names)
    stacks = [{"name": stack.title, "layers": len(stack.numbers)} for stack in found]
    layers = None if len(stacks) > 1 else sum(len(stack.numbers) for stack in found)
    return {"layers": layers, "layer_stacks": stacks}
