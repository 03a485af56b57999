"""One whole parameter at a time, put together from the shards that hold it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lag_megatron.checkpoint.boxes import Shape, numel
from lag_megatron.checkpoint.layout import Container, Layout
from lag_megatron.checkpoint.paging import read_ahead
from lag_megatron.checkpoint.tensor_parallel import cut_dim, is_gated, pieces, whole_shape
from lag_megatron.checkpoint.zero import ZeroCheckpoint


@dataclass(frozen=True)
class WholeTensors:
    """A checkpoint's parameters as if nothing had been cut; shards stay mapped from disk."""

    checkpoint: ZeroCheckpoint

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Whole shapes by name, trained parameters first."""
        size = self.checkpoint.topology.tensor_size
        local = {**self.checkpoint.layout.shapes, **self.checkpoint.frozen.shapes}
        return {name: whole_shape(name, shape, tensor_size=size) for name, shape in local.items()}

    def read(self, name: str) -> Tensor:
        """A new tensor with the parameter's master weights.

        Memory: this tensor and, where tensor parallelism cut it, one rank's part of it.
        """
        size = self.checkpoint.topology.tensor_size
        if size == 1 or cut_dim(name) is None:
            return self._part(name, 0)
        shape, whole = self.shapes[name], None
        for rank in range(size):
            part = self._part(name, rank)
            whole = torch.empty(shape, dtype=part.dtype) if whole is None else whole
            found = pieces(name, shape, tensor_rank=rank, tensor_size=size, gated=self._gated)
            for piece in found:
                here = _slices(piece.local, piece.box.shape)
                whole[_slices(piece.box.low, piece.box.shape)] = part[here]
        assert whole is not None
        return whole

    def _part(self, name: str, tensor_rank: int) -> Tensor:
        """What one tensor-parallel rank holds of a parameter."""
        trained = name in self.checkpoint.layout.shapes
        layout: Layout = self.checkpoint.layout if trained else self.checkpoint.frozen
        shape = layout.shapes[name]
        part: Tensor | None = None
        for segment in layout.segments[name]:
            buffer = self._buffer(tensor_rank, segment.container, trained=trained)
            part = torch.empty(numel(shape), dtype=buffer.dtype) if part is None else part
            end = segment.start + segment.length
            read_ahead(buffer, segment.offset, segment.length)  # shards are read only on demand
            part[segment.start : end] = buffer[segment.offset : segment.offset + segment.length]
        return (torch.empty(0) if part is None else part).view(shape)

    def _buffer(self, tensor_rank: int, container: Container, *, trained: bool) -> Tensor:
        if trained:
            return self.checkpoint.buffer(tensor_rank, container, "fp32").view(-1)
        return self.checkpoint.frozen_buffer(tensor_rank, container)

    @cached_property
    def _gated(self) -> bool:
        return is_gated(self.shapes)


def _slices(low: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(low, shape, strict=True))
