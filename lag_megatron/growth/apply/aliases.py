"""Parameters that a model uses under several names, after growing."""

from collections.abc import Mapping

from lag_megatron.checkpoint.families.layer_stack import LayerStack
from lag_megatron.checkpoint.state.source import CheckpointSource
from lag_megatron.errors import PlanError


def grown_aliases(
    source: CheckpointSource, names: Mapping[str, str], stack: LayerStack | None
) -> dict[str, str]:
    """Shared parameters of the grown model: within one layer, or with one outside of layers.

    Args:
        source: the checkpoint to grow.
        names: the old name of every name of the grown model.
        stack: the source's layers.

    Raises:
        PlanError: if layers that change places share a parameter.
    """
    unchanged = all(new == old for new, old in names.items())
    grown: dict[str, str] = {}
    for new, old in names.items():
        owner = source.aliases.get(old)
        if owner is None:
            continue
        here, before, there = (stack.match(n) if stack else None for n in (new, old, owner))
        if stack is None or there is None or unchanged:
            grown[new] = owner
        elif here and before and before.layer == there.layer:
            grown[new] = stack.name(here.layer, there.tail)
        else:
            raise PlanError(
                f"{source.path}: {old} is the same tensor as {owner} in another layer; "
                "models whose layers share parameters cannot be grown in depth."
            )
    return grown
