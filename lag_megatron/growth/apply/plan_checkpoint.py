"""A growth plan for a given checkpoint."""

from collections.abc import Mapping
from typing import Any

from lag_megatron.checkpoint.state.param_names import layers_in
from lag_megatron.checkpoint.state.source import CheckpointSource
from lag_megatron.growth.plan import GrowthPlan


def plan_checkpoint(
    source: CheckpointSource,
    *,
    operator: str,
    target_layers: int | None = None,
    options: Mapping[str, object],
    **settings: Any,
) -> GrowthPlan:
    """The plan that grows ``source``.

    Args:
        source: its layers are counted, and ``init_std`` is by default that of its model.
        operator: name in ``OPERATORS``.
        target_layers: layers after growing; by default as many as before.
        options: of the operator.
        settings: ``moments``, ``seed`` and ``init_std`` of :class:`GrowthPlan`, where given.

    Raises:
        PlanError: if the operator cannot be applied to these shapes.
    """
    source_layers = len(layers_in([*source.layout.shapes, *source.frozen.shapes]))
    model = source.client_state.get("model") or {}
    if "init_std" in model:
        settings.setdefault("init_std", model["init_std"])
    return GrowthPlan(
        operator=operator,
        options=options,
        source_layers=source_layers,
        target_layers=source_layers if target_layers is None else target_layers,
        **settings,
    )
