"""Runs of elements that are written in one launch, and their table, which kernels read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Elements that one program writes: a run is cut into tiles of this size.
TILE = 4096
_ALIGNED, _KEPT = 1, 2
_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class WriteRun:
    """Elements that are written one after the other; all tensors are flat and contiguous.

    Attributes:
        target: fp32 (n,), becomes ``source`` times ``scale``.
        source: fp32 (n,) on the device or in pinned memory; None where every element is ``scale``;
            ``target`` itself where the values are there already.
        scale: what is multiplied with, in fp32.
        weights: bf16, fp16 or fp32 (n,), becomes what the target is, rounded to the nearest.
    """

    target: Tensor
    source: Tensor | None
    scale: float = 1.0
    weights: Tensor | None = None

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        read = 0 if self.source is None else 4
        written = 0 if self.source is self.target else 4
        weights = 0 if self.weights is None else self.weights.element_size()
        return self.target.numel() * (read + written + weights)


def run_table(runs: Sequence[WriteRun], *, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """The runs in tiles, as the kernels read them.

    Returns:
        int64 (n, 5), addresses of target, source and weights (0 where there is none), elements,
        and flags: 1 where everything is aligned to four elements, 2 where the target stays; and
        fp32 (n,), the scales.
    """
    for run in runs:
        _require_flat(run)
    given = [
        (
            run.target.data_ptr(),
            0 if run.source is None else run.source.data_ptr(),
            0 if run.weights is None else run.weights.data_ptr(),
            run.target.numel(),
            _KEPT if run.source is run.target else 0,
        )
        for run in runs
    ]
    whole = np.array(given, dtype=np.int64).reshape(-1, _COLUMNS)
    width = next((r.weights.element_size() for r in runs if r.weights is not None), 4)
    tiles = -(-whole[:, 3] // tile)
    run_of = np.repeat(np.arange(len(whole)), tiles)
    rows = whole[run_of]
    first = (np.arange(len(rows)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile
    for column, size in enumerate((4, 4, width)):
        rows[:, column] += np.where(rows[:, column] > 0, first * size, 0)
    rows[:, 3] = np.minimum(rows[:, 3] - first, tile)
    units = np.array([16, 16, 4 * width, 4])
    rows[:, 4] |= np.where((rows[:, :4] % units == 0).all(axis=1), _ALIGNED, 0)
    scales = np.array([run.scale for run in runs], dtype=np.float32)[run_of]
    return torch.from_numpy(rows), torch.from_numpy(scales)


def _require_flat(run: WriteRun) -> None:
    """Check shapes, strides and types: a kernel gets addresses alone and cannot."""
    count = run.target.numel()
    for tensor in (run.target, run.source, run.weights):
        if tensor is not None:
            assert tensor.shape == (count,), f"{tuple(tensor.shape)} for {count} elements"
            assert tensor.is_contiguous() or count < 2, "a run with gaps"
    for tensor in (run.target, run.source):
        assert tensor is None or tensor.dtype is torch.float32, "a state in another type"
