"""Checks that a given model can load a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.layout import Layout, ParamGroup
from lag_megatron.errors import CheckpointError

_SHOWN = 3


def require_same_parameters(
    path: Path, found: Sequence[ParamGroup], expected: Sequence[ParamGroup]
) -> None:
    """Check that a checkpoint has a model's parameters: names, shapes, groups and order.

    Flat shards carry no names, so DeepSpeed would load permuted ones without an error.

    Args:
        path: the checkpoint.
        found: the checkpoint's groups on one tensor-parallel rank, after growth or resharding.
        expected: the model's groups.

    Raises:
        CheckpointError: naming the differences.
    """
    details = parameter_differences(found, expected)
    if not details:
        return
    raise CheckpointError(
        f"{path}: holds another architecture than the configuration: "
        + "; ".join(details)
        + ". Use the configuration it was trained with, or another run directory."
    )


def parameter_differences(found: Sequence[ParamGroup], expected: Sequence[ParamGroup]) -> list[str]:
    """What differs between the parameter groups of a checkpoint and of a model; empty if nothing.

    Names, shapes, groups and their order are compared.
    """
    if [list(g.items()) for g in found] == [list(g.items()) for g in expected]:
        return []
    details = list(_differences(_merged(found), _merged(expected)))
    return details or ["the same parameters in another order or other groups"]


def require_same_optimizer(path: Path, found: Layout, expected: Layout) -> None:
    """Check that a checkpoint is of the model's optimizer; DeepSpeed does not.

    Raises:
        CheckpointError: naming both optimizers.
    """
    if found.optimizer != expected.optimizer:
        raise CheckpointError(
            f"{path}: holds the states of {found.optimizer}, but optimizer.name is "
            f"{expected.optimizer}. Use the optimizer it was trained with, or another run "
            "directory."
        )


def _merged(groups: Sequence[ParamGroup]) -> dict[str, Shape]:
    return {name: shape for group in groups for name, shape in group.items()}


def _differences(has: Mapping[str, Shape], wants: Mapping[str, Shape]) -> Iterator[str]:
    for title, names in (
        ("missing", wants.keys() - has.keys()),
        ("not in the model", has.keys() - wants.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN])
            more = " ..." if len(names) > _SHOWN else ""
            yield f"{title}: {shown}{more} ({len(names)})"
    unequal = [name for name in sorted(has.keys() & wants.keys()) if has[name] != wants[name]]
    for name in unequal[:_SHOWN]:
        yield f"{name}: shape {has[name]}, expected {wants[name]}"
