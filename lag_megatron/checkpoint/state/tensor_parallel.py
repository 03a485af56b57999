"""The dimension along which tensor parallelism shards each parameter, as a table.

Names and dimensions are Megatron-Core's: column-parallel weights by output, row-parallel by input,
embeddings by vocabulary.  ``linear_qkv`` is stored by query group, so an even cut keeps groups
together; the gate and up halves of a gated ``linear_fc1`` are each cut on their own.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lag_megatron.checkpoint.state.box import Box, Shape, full_box

# (pattern of the end of a parameter's name, dimension); other parameters are replicated.
CUTS: tuple[tuple[str, int], ...] = (
    (r"embedding\.word_embeddings\.weight", 0),
    (r"output_layer\.(weight|bias)", 0),
    (r"self_attention\.linear_qkv\.(weight|bias)", 0),
    (r"self_attention\.linear_proj\.weight", 1),
    (r"mlp\.linear_fc1\.(weight|bias)", 0),
    (r"mlp\.linear_fc2\.weight", 1),
)
GATED = re.compile(r"mlp\.linear_fc1\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class ShardBox:
    """A box of the unsharded parameter, and its corner in one rank's shard."""

    box: Box
    local: Shape


@functools.cache
def cut_dim(name: str) -> int | None:
    """The dimension along which a parameter is sharded; None if every rank has all of it."""
    for pattern, dim in CUTS:
        if re.search(pattern + "$", name):
            return dim
    return None


def unsharded_shape(name: str, local: Shape, *, tensor_size: int) -> Shape:
    """Shape of the unsharded parameter, from that of one rank's shard."""
    dim = cut_dim(name)
    if dim is None:
        return local
    return (*local[:dim], local[dim] * tensor_size, *local[dim + 1 :])


def is_gated(shapes: Mapping[str, Shape]) -> bool:
    """Whether fc1 holds a gate and an up half: it has twice as many rows as fc2 has columns."""
    for name, shape in shapes.items():
        if name.endswith("mlp.linear_fc1.weight"):
            return shape[0] == 2 * shapes[name.replace("linear_fc1", "linear_fc2")][1]
    return False


def local_shape(name: str, shape: Shape, *, tensor_size: int, gated: bool = False) -> Shape:
    """Shape of one rank's shard of an unsharded parameter.

    Raises:
        ValueError: if the parameter cannot be cut into that many equal parts.
    """
    dim = cut_dim(name)
    if dim is None:
        return shape
    parts = 2 if gated and GATED.search(name) else 1
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
    parts = 2 if gated and GATED.search(name) else 1
    unit = shape[dim] // (parts * tensor_size)
    for part in range(parts):
        low, local = [0] * len(shape), [0] * len(shape)
        low[dim] = part * (shape[dim] // parts) + tensor_rank * unit
        local[dim] = part * unit
        extent = (*shape[:dim], unit, *shape[dim + 1 :])
        yield ShardBox(Box(tuple(low), extent), tuple(local))
