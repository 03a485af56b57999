"""A growth plan for a given checkpoint."""

from collections.abc import Mapping
from typing import Any

from lag_megatron.checkpoint.families.layer_stack import find_layer_stack, largest_stack
from lag_megatron.checkpoint.state.source import CheckpointSource, unsharded_shapes
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.growth.plan import GrowthPlan


def plan_checkpoint(
    source: CheckpointSource,
    *,
    operator: str,
    target_layers: int | None = None,
    options: Mapping[str, object],
    names: ParamNames | None = None,
    **settings: Any,
) -> GrowthPlan:
    """The plan that grows ``source``.

    Args:
        source: its layers are counted, and ``init_std`` is by default that of its model.
        operator: name in ``OPERATORS``.
        target_layers: layers after growing; by default as many as before.
        options: of the operator.
        names: what the user says of the model's parameter names, where no table has them.
        settings: ``moments``, ``seed`` and ``init_std`` of :class:`GrowthPlan`, where given.

    Raises:
        PlanError: if the operator cannot be applied to these shapes, or the model has two stacks
            of layers.
    """
    stack_of = largest_stack if operator == "identity" else find_layer_stack
    stack = stack_of(unsharded_shapes(source), names)
    source_layers = len(stack.numbers) if stack else 0
    model = source.client_state.get("model") or {}
    if "init_std" in model:
        settings.setdefault("init_std", model["init_std"])
    return GrowthPlan(
        operator=operator,
        options=options,
        source_layers=source_layers,
        target_layers=source_layers if target_layers is None else target_layers,
        names=names,
        **settings,
    )
