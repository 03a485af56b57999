"""An exponential moving average of an engine's sharded weights, to be evaluated in their place.

Each rank averages the fp32 masters that it holds; no weight is gathered.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint.storage import manifest, torch_pickle
from lag_megatron.engine.protocol import ShardedState
from lag_megatron.errors import CheckpointError, write_failure

# Karras et al. 2024 (EDM2), section 3.1: the average's width is 10 % of the steps averaged over.
GAMMA = 6.94


class WeightAverage:
    """Power-function average of the masters since it was made.

    ``w_t = b(t) w_(t-1) + (1 - b(t)) p_t`` with ``b(t) = (1 - 1/t)^(GAMMA + 1)`` (Karras et al.
    2024, equation 2): its window grows with t, so no decay has to be chosen for a lag.

    Args:
        state: that of an engine; its buffers must stay where they are.
    """

    def __init__(self, state: ShardedState) -> None:
        self._state = state
        self._averages = [master.detach().clone() for master in state.masters]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Average in the masters after ``steps`` optimizer steps, from 1."""
        weight = 1.0 - (1.0 - 1.0 / steps) ** (GAMMA + 1.0)
        for average, master in zip(self._averages, self._state.masters, strict=True):
            average.lerp_(master.detach(), weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages as the engine's weights; afterwards its own are back, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save(self, folder: Path, *, rank: int, size: int) -> dict[str, Any]:
        """Write this rank's part beside a checkpoint's shards; returns its manifest entry.

        Raises:
            CheckpointError: if it cannot be written.
        """
        path = folder / file_name(rank, size)
        try:
            torch.save(self._averages, path)
        except (OSError, RuntimeError) as error:  # torch's word for a full disk is the latter
            reason, advice = write_failure(error)
            raise CheckpointError(f"{path}: cannot be written: {reason} {advice}") from error
        return {path.name: manifest.file_entry(path)}

    @torch.no_grad()
    def load(self, folder: Path, *, rank: int, size: int) -> None:
        """Go on from a part that the same rank of as many wrote.

        Raises:
            CheckpointError: if it is missing, damaged or of another model.
        """
        path = folder / file_name(rank, size)
        saved = torch_pickle.load(path)
        shapes = [average.shape for average in self._averages]
        if not isinstance(saved, list) or [getattr(v, "shape", None) for v in saved] != shapes:
            raise CheckpointError(
                f"{path}: expected an average of this model's weights, but it holds other tensors. "
                "Restore it from a copy, or use another tag."
            )
        for average, value in zip(self._averages, saved, strict=True):
            average.copy_(value)

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, master in zip(self._averages, self._state.masters, strict=True):
            weights = master.detach().clone()
            master.detach().copy_(average)
            average.copy_(weights)
        self._state.sync_weights()


def file_name(rank: int, size: int) -> str:
    """Name of one rank's part; another number of ranks cannot go on from it."""
    return f"weight_average_{rank:03d}_of_{size:03d}.pt"


def has_weight_average(folder: Path, *, size: int) -> bool:
    """Whether a checkpoint holds an average of this many ranks."""
    return (folder / file_name(size - 1, size)).is_file()
