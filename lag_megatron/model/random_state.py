"""Random numbers as a function of (seed, step, rank): nothing to save, nothing to lose on resume.

Megatron's tracker keeps two streams: the default one, equal on tensor-parallel ranks, for what is
replicated, and ``model-parallel-rng``, different on each, for what is split.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

from lag_megatron.parallel import World

_SPLIT_STREAM = "model-parallel-rng"


def seed_everywhere(seed: int) -> None:
    """Give every rank the same stream; models are initialised from it, whatever the topology."""
    torch.manual_seed(seed)
    _install_cpu_tracker()


def seed_step(seed: int, step: int, world: World) -> None:
    """Set this rank's streams for one optimizer step."""
    replicated = _derive(seed, step, world.data_rank)
    split = _derive(seed, step, world.data_rank, world.tensor_rank)
    torch.manual_seed(replicated)
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(_SPLIT_STREAM, split)


def _derive(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class CpuRngTracker:
    """Megatron's RNG tracker for a machine without CUDA; same interface, default generator."""

    def __init__(self) -> None:
        self._states: dict[str, torch.Tensor] = {}

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
    def fork(self, name: str = _SPLIT_STREAM) -> Iterator[None]:
        """Draw from a stream and go back to the default one."""
        default = torch.get_rng_state()
        torch.set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(default)


def _install_cpu_tracker() -> None:
    """The one place where Megatron is patched, and only where there is no CUDA.

    Its tracker handles CUDA generators alone and there is no official hook for another.
    """
    if torch.cuda.is_available():
        megatron_random.initialize_rng_tracker()
        return
    module: Any = megatron_random
    if not isinstance(module._CUDA_RNG_STATE_TRACKER, CpuRngTracker):
        module._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
        module._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
