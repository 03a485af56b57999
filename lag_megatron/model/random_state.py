"""Random numbers as a function of (seed, step, rank): checkpoints need no RNG state.

Megatron's tracker keeps two streams: the default one, equal on tensor-parallel ranks, for what is
replicated, and ``model-parallel-rng``, different on each, for what is split.
"""

import hashlib

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from lag_megatron.distributed.world import World
from lag_megatron.model.cpu_shims import install_cpu_shims

_SPLIT_STREAM = "model-parallel-rng"


def seed_everywhere(seed: int) -> None:
    """Give every rank the same streams, for what is drawn before the first step."""
    install_cpu_shims()
    _set_streams(seed, seed)


def seed_step(seed: int, step: int, world: World) -> None:
    """Set this rank's streams for one optimizer step."""
    replicated = _derive(seed, step, world.data_rank)
    split = _derive(seed, step, world.data_rank, world.tensor_rank)
    _set_streams(replicated, split)


def _set_streams(replicated: int, split: int) -> None:
    torch.manual_seed(replicated)
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(_SPLIT_STREAM, split)


def _derive(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
