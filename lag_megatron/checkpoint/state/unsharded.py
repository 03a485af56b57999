"""A training state as if nothing had been cut, for formats with a name for each tensor.

It is read a run of elements at a time, so no tensor need fit into memory.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.state.layout import Container, Segment, State
from lag_megatron.checkpoint.state.region import Fill, Region
from lag_megatron.checkpoint.state.source import CheckFn
from lag_megatron.checkpoint.state.spec import CheckpointSpec

_HERE = Container(0, 0)  # a region's segments are found by their offsets


@dataclass(frozen=True)
class UnshardedState:
    """What is to be written, under the topology of one rank without ZeRO.

    Attributes:
        path: where it is read, for messages.
        draft: everything beside values.
        fill: makes the values.
        check: refuses a source whose content is damaged.
    """

    path: Path
    draft: CheckpointSpec
    fill: Fill
    check: CheckFn

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of every parameter, trained ones first."""
        return {**self.draft.layout.shapes, **self.draft.frozen.shapes}

    def is_trained(self, name: str) -> bool:
        """Whether the optimizer has a parameter."""
        return name in self.draft.layout.shapes

    def region(self, name: str, state: State = "fp32", *runs: tuple[int, int]) -> Region:
        """Runs of a parameter's elements, (start, length) each, one behind the other.

        Without runs, all of it.
        """
        found: list[tuple[str, Segment]] = []
        offset = 0
        for start, length in runs or ((0, numel(self.shapes[name])),):
            found.append((name, Segment(start, length, _HERE, offset)))
            offset += length
        return Region(state, tuple(found), offset, trained=self.is_trained(name))

    def read(self, name: str, state: State, start: int, length: int) -> Tensor:
        """A new flat tensor of some elements, in fp32."""
        values = torch.empty(length)
        self.fill(self.region(name, state, (start, length)), values)
        return values
