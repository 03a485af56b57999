"""Initial weights that depend on (seed, parameter, position) and on nothing else.

A counter-based generator (Philox, Salmon et al. 2011) gives element ``i`` of a parameter the same
value on any rank and in any shard.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lag_megatron.checkpoint.state.box import Box, Shape, interval_boxes, strides_of
from lag_megatron.config.schema.param_names import Role

_WORDS_PER_COUNT = 4
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Normal:
    """Independent normal values of mean 0, from the generator of ``key``."""

    std: float
    key: str


@dataclass(frozen=True, slots=True)
class Constant:
    """One value everywhere."""

    value: float


@dataclass(frozen=True, slots=True)
class Diagonals:
    """Pieces of the identity in a matrix.

    Attributes:
        runs: (row, column, length), ones at (row + i, column + i); no two runs share a row.
        rest: of rows without a run; 0 if None.
        transposed: whether runs and rows are those of the transposed matrix.
    """

    runs: tuple[tuple[int, int, int], ...]
    rest: Normal | None = None
    transposed: bool = False


WeightInit = Normal | Constant | Diagonals


def initial_weights(
    role: Role, name: str, shape: Shape, *, num_layers: int, init_std: float, key: str
) -> Normal | Constant | None:
    """Megatron-Core's initial weights of a parameter, by its role.

    Norms are the identity, biases 0, weights normal; the projections back into the residual stream
    are scaled by ``1 / sqrt(2 num_layers)`` (Radford et al. 2019, section 2.3), and their biases,
    the vectors among branch outputs, are 0.

    Args:
        role: what the parameter is for.
        name: its whole name, which its values depend on.
        shape: of the whole parameter.
        num_layers: depth of the model.
        init_std: standard deviation of weights.
        key: names the values, together with ``name``.

    Returns:
        None for what is copied: layer scales, and what is fixed.
    """
    if role in ("layer_scale", "fixed"):
        return None
    if role == "norm_weight":
        return Constant(1.0)
    is_output = role == "branch_output"
    if role in ("bias", "norm_weight_zero_centred") or (is_output and len(shape) < 2):
        return Constant(0.0)
    std = init_std / np.sqrt(2.0 * num_layers) if is_output else init_std
    return Normal(float(std), f"{key}/{name}")


def fill(target: Tensor, init: WeightInit, *, shape: Shape, box: Box) -> None:
    """Write the values of ``box`` of a parameter of ``shape`` into ``target``, which has its shape.

    Memory stays at a few megabytes whatever the size.
    """
    if isinstance(init, Constant):
        target.fill_(init.value)
        return
    if isinstance(init, Diagonals):
        _fill_diagonals(target, init, shape, box)
        return
    for part, start, length in _runs(shape, box):
        for begin in range(0, length, _CHUNK):
            count = min(_CHUNK, length - begin)
            values = torch.from_numpy(normal(init, start + begin, count))
            for piece in interval_boxes(part.shape, begin, count):
                size = int(np.prod(piece.shape))
                low = tuple(a + b for a, b in zip(part.low, piece.low, strict=True))
                view = target[tuple(slice(a, a + n) for a, n in zip(low, piece.shape, strict=True))]
                view.copy_(values[:size].view(piece.shape))
                values = values[size:]


def _fill_diagonals(target: Tensor, init: Diagonals, shape: Shape, box: Box) -> None:
    if init.transposed:
        target, shape, box = target.t(), shape[::-1], Box(box.low[::-1], box.shape[::-1])
    fill(target, init.rest or Constant(0.0), shape=shape, box=box)
    (top, left), (rows, columns) = box.low, box.shape
    for row, column, length in init.runs:
        first, last = max(row - top, 0), min(row + length - top, rows)
        if first >= last:
            continue
        target[first:last].zero_()
        shift = column - left - (row - top)  # of the run, from a place's row to its column
        first, last = max(first, -shift), min(last, columns - shift)
        if first < last:
            target[first:last, first + shift : last + shift].diagonal().fill_(1.0)


def normal(init: Normal, start: int, count: int) -> np.ndarray:
    """Elements ``start .. start + count`` of a parameter's values, fp32.

    Box and Muller's transform of the two halves of one 64-bit word per element.
    """
    key = np.frombuffer(hashlib.blake2b(init.key.encode(), digest_size=16).digest(), np.uint64)
    counter, skip = divmod(start, _WORDS_PER_COUNT)
    words = np.random.Philox(counter=counter, key=key).random_raw(skip + count)[skip:]
    radius = ((words >> np.uint64(32)) + np.uint64(1)).astype(np.float64) * 2.0**-32
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    return (np.sqrt(-2.0 * np.log(radius)) * np.cos(angle) * init.std).astype(np.float32)


def _runs(shape: Shape, box: Box) -> Iterator[tuple[Box, int, int]]:
    """Contiguous runs of a box: part of the box, start and length in the whole array."""
    inner = len(shape)
    while inner > 1 and box.shape[inner - 1] == shape[inner - 1]:
        inner -= 1
    split = max(inner - 1, 0)
    steps = strides_of(shape)
    rest = box.shape[split:]
    length = int(np.prod(rest))
    for corner in np.ndindex(*box.shape[:split]):
        low = (*corner, *(0,) * len(rest))
        start = sum((a + b) * s for a, b, s in zip(box.low, low, steps, strict=True))
        yield Box(low, (1,) * split + rest), start, length
