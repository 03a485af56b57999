"""Whether a checkpoint is one that a given model and topology can take."""

from collections.abc import Iterator, Mapping, Sequence

from lag_megatron.checkpoint.boxes import Shape
from lag_megatron.checkpoint.layout import Group, Topology
from lag_megatron.checkpoint.zero import ZeroCheckpoint
from lag_megatron.errors import CheckpointError

_SHOWN = 3


def require_same_topology(source: ZeroCheckpoint, topology: Topology) -> None:
    """Refuse a checkpoint of another topology; DeepSpeed's loader takes none.

    Raises:
        CheckpointError: naming the difference.
    """
    for what, found, expected in (
        ("ZeRO stage", source.topology.zero_stage, topology.zero_stage),
        ("data-parallel ranks", source.topology.data_size, topology.data_size),
        ("tensor-parallel ranks", source.topology.tensor_size, topology.tensor_size),
        ("precision", source.topology.precision, topology.precision),
    ):
        if found != expected:
            raise CheckpointError(
                f"{source.path}: saved with {what} {found}, but this run has {expected}. "
                f"Start it with {what} {found}."
            )


def require_same_parameters(
    source: ZeroCheckpoint, expected: Sequence[Group], *, tensor_rank: int
) -> None:
    """Refuse a checkpoint whose parameters differ in name, shape, group or order.

    Flat shards carry no names, so DeepSpeed loads permuted ones without a word.

    Raises:
        CheckpointError: naming the differences.
    """
    found = source.parameter_groups(tensor_rank)
    if [list(g.items()) for g in found] == [list(g.items()) for g in expected]:
        return
    details = list(_differences(_merged(found), _merged(expected)))
    raise CheckpointError(
        f"{source.path}: holds another architecture than the configuration: "
        + "; ".join(details or ["the same parameters in another order or other groups"])
        + ". Use the configuration it was trained with, or another run directory."
    )


def _merged(groups: Sequence[Group]) -> dict[str, Shape]:
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
