"""A training state with whole parameters, for formats that name each tensor.

It is read a run of elements at a time, so no tensor has to fit into memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.state.layout import Container, Segment, State
from lag_megatron.checkpoint.state.region import Region, RegionFiller
from lag_megatron.checkpoint.state.source import CheckFn
from lag_megatron.checkpoint.state.spec import CheckpointSpec

_HERE = Container(0, 0)  # a region's segments are found by their offsets


@dataclass(frozen=True)
class UnshardedState:
    """A state to write, under the topology of one rank without ZeRO.

    Attributes:
        path: the checkpoint that is read, for messages.
        spec: everything except the values.
        fill: makes the values.
        check: verifies the source's content; raises ``CheckpointError``.
    """

    path: Path
    spec: CheckpointSpec
    fill: RegionFiller
    check: CheckFn

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of every parameter, trained ones first."""
        return {**self.spec.layout.shapes, **self.spec.frozen.shapes}

    def is_trained(self, name: str) -> bool:
        """Whether the optimizer has a parameter."""
        return name in self.spec.layout.shapes

    def region(self, name: str, state: State = "fp32", *runs: tuple[int, int]) -> Region:
        """A region of runs (start, length) of a parameter's elements, one after the other.

        Without runs it is the whole parameter.
        """
        found: list[tuple[str, Segment]] = []
        offset = 0
        for start, length in runs or ((0, numel(self.shapes[name])),):
            found.append((name, Segment(start, length, _HERE, offset)))
            offset += length
        return Region(state, tuple(found), offset, trained=self.is_trained(name))

    def read(self, name: str, state: State, start: int, length: int) -> Tensor:
        """Elements ``start .. start + length``, as a new flat fp32 tensor."""
        return self.read_runs(name, state, [(start, length)])

    def read_runs(self, name: str, state: State, runs: Sequence[tuple[int, int]]) -> Tensor:
        """Runs (start, length) of elements, one after the other, as a new flat fp32 tensor."""
        values = torch.empty(sum(length for _, length in runs))
        self.fill(self.region(name, state, *runs), values)
        return values
