"""Replacements for what Megatron-Core takes from CUDA, on machines without it.

Megatron-Core has no hooks for this, so its modules are patched, here alone; with CUDA nothing is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random


class CpuRngTracker:
    """Megatron's RNG tracker for a machine without CUDA; same interface, default generator."""

    def __init__(self) -> None:
        self._states: dict[str, torch.Tensor] = {}
        self._current: str | None = None

    def is_initialized(self) -> bool:
        """Whether at least one stream exists."""
        return bool(self._states)

    def reset(self) -> None:
        """Forget all streams."""
        self._states = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        """A copy of the streams' states."""
        return dict(self._states)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Replace the streams' states."""
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Start a stream."""
        if name in self._states:
            raise ValueError(f"random stream {name} exists")
        self._states[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from a stream and go back to the one before; inside itself it simply goes on."""
        if name == self._current:
            yield
            return
        before, self._current = self._current, name
        outer = torch.get_rng_state()
        torch.set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(outer)
            self._current = before


def install_cpu_shims() -> None:
    """Give Megatron a CPU in place of CUDA's device and generator; does nothing where CUDA is.

    Its sequence-parallel buffers and rotary embedding need the current device, its recomputation
    the generator's state.
    """
    module: Any = megatron_random
    if torch.cuda.is_available() or isinstance(module._CUDA_RNG_STATE_TRACKER, CpuRngTracker):
        return
    module._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    module._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
