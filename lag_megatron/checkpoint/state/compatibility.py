"""Whether a checkpoint is one that a given model can take."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.layout import Layout, ParamGroup
from lag_megatron.errors import CheckpointError

_SHOWN = 3


def require_same_parameters(
    path: Path, found: Sequence[ParamGroup], expected: Sequence[ParamGroup]
) -> None:
    """Refuse a checkpoint whose parameters differ in name, shape, group or order.

    Flat shards carry no names, so DeepSpeed loads permuted ones without a word.

    Args:
        path: the checkpoint.
        found: what it holds for one tensor rank, or will when it is grown or spread anew.
        expected: what the model has.

    Raises:
        CheckpointError: naming the differences.
    """
    if [list(g.items()) for g in found] == [list(g.items()) for g in expected]:
        return
    details = list(_differences(_merged(found), _merged(expected)))
    raise CheckpointError(
        f"{path}: holds another architecture than the configuration: "
        + "; ".join(details or ["the same parameters in another order or other groups"])
        + ". Use the configuration it was trained with, or another run directory."
    )


def require_same_optimizer(path: Path, found: Layout, expected: Layout) -> None:
    """Refuse a checkpoint of another optimizer, whose states DeepSpeed would take unseen.

    Raises:
        CheckpointError: naming both.
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
