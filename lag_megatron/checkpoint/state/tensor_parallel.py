"""The part of each parameter that a tensor-parallel rank holds, by Megatron-Core's names.

The dimension along which a parameter is cut stands in the tables of ``checkpoint/families``.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lag_megatron.checkpoint.families import bert, gpt, llama
from lag_megatron.checkpoint.families.megatron_layer import MEGATRON_LAYER
from lag_megatron.checkpoint.state.box import Box, Shape, full_box

# Dimension by the end of a parameter's name; other parameters are replicated.
CUTS: Mapping[str, int] = {
    **{n: d for model in (gpt, bert, llama) for n, d in model.MEGATRON.cuts.items()},
    **MEGATRON_LAYER.cuts,
}
_FC1, _FC2 = MEGATRON_LAYER.mlp_in[0], MEGATRON_LAYER.mlp_out
_FC1_MODULE = _FC1.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class ShardBox:
    """A box of the unsharded parameter, and its corner in one rank's shard."""

    box: Box
    local: Shape


@functools.cache
def cut_dim(name: str) -> int | None:
    """The dimension along which a parameter is sharded; None if every rank has all of it."""
    return next((dim for end, dim in CUTS.items() if _ends(name, end)), None)


def may_be_gated(name: str) -> bool:
    """Whether a parameter holds a gate and an up half in a gated MLP."""
    return _ends(name, f"{_FC1_MODULE}.weight") or _ends(name, f"{_FC1_MODULE}.bias")


def unsharded_shape(name: str, local: Shape, *, tensor_size: int) -> Shape:
    """Shape of the unsharded parameter, from that of one rank's shard."""
    dim = cut_dim(name)
    if dim is None:
        return local
    return (*local[:dim], local[dim] * tensor_size, *local[dim + 1 :])


def is_gated(shapes: Mapping[str, Shape]) -> bool:
    """Whether fc1 holds a gate and an up half: it has twice as many rows as fc2 has columns."""
    for name, shape in shapes.items():
        if _ends(name, _FC1):
            return shape[0] == 2 * shapes[name.removesuffix(_FC1) + _FC2][1]
    return False


def local_shape(name: str, shape: Shape, *, tensor_size: int, gated: bool = False) -> Shape:
    """Shape of one rank's shard of an unsharded parameter.

    Raises:
        ValueError: if the parameter cannot be cut into that many equal parts.
    """
    dim = cut_dim(name)
    if dim is None:
        return shape
    parts = 2 if gated and may_be_gated(name) else 1
    if shape[dim] % (parts * tensor_size):
        raise ValueError(
            f"{name} of shape {shape} cannot be cut into {tensor_size} equal parts along "
            f"dimension {dim}. Choose a tensor-parallel size that divides it."
        )
    return (*shape[:dim], shape[dim] // tensor_size, *shape[dim + 1 :])


def shard_boxes(
    name: str, shape: Shape, *, tensor_rank: int, tensor_size: int, gated: bool
) -> Iterator[ShardBox]:
    """The boxes of an unsharded parameter of ``shape`` that one rank holds."""
    dim = cut_dim(name)
    if dim is None or tensor_size == 1:
        yield ShardBox(full_box(shape), (0,) * len(shape))
        return
    parts = 2 if gated and may_be_gated(name) else 1
    unit = shape[dim] // (parts * tensor_size)
    for part in range(parts):
        low, local = [0] * len(shape), [0] * len(shape)
        low[dim] = part * (shape[dim] // parts) + tensor_rank * unit
        local[dim] = part * unit
        extent = (*shape[:dim], unit, *shape[dim + 1 :])
        yield ShardBox(Box(tuple(low), extent), tuple(local))


def _ends(name: str, end: str) -> bool:
    """Whether a name ends so, from a dot on."""
    return name == end or name.endswith(f".{end}")
