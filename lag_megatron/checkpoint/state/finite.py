"""NaN and infinities among the values of a training state.

Only parameters' elements count: padding between and after them may hold anything.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.layout import Container, Layout, Segment, State
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.state.source import CheckpointSource

_PIECE = 1 << 20  # elements that are read at a time
_TITLES = {
    "fp32": "the weight",
    "exp_avg": "Adam's first moment",
    "exp_avg_sq": "Adam's second moment",
}


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The values of one state of a parameter that are not finite, on one rank.

    Attributes:
        parameter: its name.
        state: which state.
        tensor_rank: of the rank.
        data_rank: of the rank.
        index: of the first one in the parameter, or in its part on the tensor-parallel rank.
        value: of the first one.
        count: how many there are.
    """

    parameter: str
    state: State
    tensor_rank: int
    data_rank: int
    index: Shape
    value: float
    count: int

    def __str__(self) -> str:
        values = "1 value that is" if self.count == 1 else f"{self.count:,} values that are"
        return (
            f"{self.parameter}: {_TITLES.get(self.state, self.state)} has {values} not finite, "
            f"the first ({self.value}) at index {list(self.index)}, on data-parallel rank "
            f"{self.data_rank} of tensor-parallel rank {self.tensor_rank}"
        )


def all_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities.

    A sum is finite only if all its terms are, takes one pass and no memory.  Finite values whose
    sum overflows are looked at one by one.
    """
    if not values.is_floating_point():
        return True
    total = values.sum(dtype=torch.float32 if values.dtype is torch.float16 else None)
    return math.isfinite(total.item()) or bool(torch.isfinite(values).all())


def nonfinite_values(
    source: CheckpointSource, *, names: Collection[str] | None = None
) -> Iterator[NonFinite]:
    """Read a checkpoint's values and yield those that are not finite.

    Args:
        source: the checkpoint.
        names: of the parameters to read; all by default.

    Raises:
        CheckpointError: if values cannot be read.
    """
    for trained, whole in ((True, source.layout), (False, source.frozen)):
        for state, layout in whole.states.items():
            if not trained and state != "fp32":
                continue
            for rank, container, held in _buffers(source, layout):
                parts = [part for part in held if names is None or part[0] in names]
                if not parts:
                    continue
                there = source.elements(rank, container, state, trained=trained)
                for name, segment in parts:
                    pieces = (
                        there.strided((min(_PIECE, segment.length - start),), (1,),
                                      segment.offset + start)
                        for start in range(0, segment.length, _PIECE)
                    )  # fmt: skip
                    yield from _found(name, state, layout.shapes[name], segment, pieces, rank)


def nonfinite_in(
    buffer: Tensor, region: Region, shapes: Mapping[str, Shape], *, tensor_rank: int
) -> Iterator[NonFinite]:
    """The same for a flat buffer in memory.

    Args:
        buffer: its values.
        region: what it holds.
        shapes: of the parameters' state on this tensor-parallel rank.
        tensor_rank: of this rank.
    """
    for name, segment in region.segments:
        values = buffer[segment.offset : segment.offset + segment.length]
        yield from _found(name, region.state, shapes[name], segment, [values], tensor_rank)


def _buffers(
    source: CheckpointSource, layout: Layout
) -> Iterator[tuple[int, Container, Sequence[tuple[str, Segment]]]]:
    """Every buffer of a checkpoint: its tensor-parallel rank, its place and what it holds."""
    data_ranks = sorted({container.data_rank for container in layout.lengths})
    for tensor_rank, data_rank in itertools.product(range(source.topology.tensor_size), data_ranks):
        for container, held in layout.buffers_of_rank(data_rank).items():
            yield tensor_rank, container, held


def _found(
    name: str,
    state: State,
    shape: Shape,
    segment: Segment,
    pieces: Iterable[Tensor],
    tensor_rank: int,
) -> Iterator[NonFinite]:
    """What is not finite in a segment's values, given in pieces; at most one."""
    first, value, count, start = -1, 0.0, 0, segment.start
    for piece in pieces:
        if not all_finite(piece):
            (places,) = torch.nonzero(~torch.isfinite(piece), as_tuple=True)
            if not count:
                first, value = start + int(places[0]), float(piece[places[0]])
            count += len(places)
        start += len(piece)
    if count:
        index = tuple(int(i) for i in np.unravel_index(first, shape))
        yield NonFinite(name, state, tensor_rank, segment.container.data_rank, index, value, count)
