"""Probe groups: parts of the run's ranks, each of which trains a candidate of its own."""

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist

from lag_megatron.distributed.world import CONTROL_TIMEOUT, World, local_world_size
from lag_megatron.search.context import ProbeTrainer, SearchContext
from lag_megatron.search.event import GrowthEvent
from lag_megatron.search.worker import ProbeWorker

# What activations, logits and DeepSpeed's buffers leave of a device for the training state.
_STATE_SHARE = 0.6


def count_groups(world: World, event: GrowthEvent, *, state_bytes: Callable[[int], float]) -> int:
    """How many candidates are probed at a time; collective.

    ``auto`` is the largest number that divides the data-parallel replicas, leaves no group idle
    from the start, and whose ranks can hold the state: ZeRO shards it within a group alone.  A
    given number is at most what leaves none idle.

    Args:
        world: all ranks of the run.
        event: what is probed.
        state_bytes: bytes of training state on one rank of a group of so many replicas.
    """
    return world.run_on_rank0(lambda: _count(world, event, state_bytes))


def _count(world: World, event: GrowthEvent, state_bytes: Callable[[int], float]) -> int:
    wanted, replicas, candidates = event.growth.probe_groups, world.data_size, len(event.pool)
    divisors = [count for count in range(1, replicas + 1) if replicas % count == 0]
    busy = [count for count in divisors if count <= candidates]
    if wanted != "auto":
        return min(int(wanted), busy[-1])
    available = _STATE_SHARE * _memory_of_rank(world)
    return max((c for c in busy if state_bytes(replicas // c) <= available), default=1)


@contextlib.contextmanager
def probe_group(
    context: SearchContext,
    world: World,
    event: GrowthEvent,
    count: int,
    *,
    build_trainer: Callable[[World], ProbeTrainer],
    timeout: float,
) -> Iterator[ProbeWorker]:
    """The worker of this rank's probe group of ``count``; collective.

    Its engine is destroyed at the end.

    Args:
        context: of the run.
        world: all ranks of the run.
        event: what is probed.
        count: groups; divides the data-parallel replicas.
        build_trainer: makes a trainer, and its engine, on the ranks of this rank's group.
        timeout: of the group's collective calls, in seconds.
    """
    trainer = build_trainer(split_world(world, count, timeout=timeout))
    worker = ProbeWorker(context, trainer, event, count=count)
    yield worker
    worker.release()
    trainer.engine.destroy()


@functools.cache  # process groups cannot be destroyed one by one, so events share them
def split_world(world: World, count: int, *, timeout: float) -> World:
    """This process among the ranks of its probe group; collective over the whole world.

    Groups are runs of neighbouring ranks, so tensor-parallel ranks stay together, and on a host
    where their number divides the host's.

    Args:
        world: of the run.
        count: groups; divides the data-parallel replicas.
        timeout: of the group's collective calls, in seconds.
    """
    size, tensor = world.size // count, world.tensor_size
    mine: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
    for start in range(0, world.size, size):
        ranks = range(start, start + size)
        control = dist.new_group(list(ranks), backend="gloo", timeout=CONTROL_TIMEOUT)
        replicas = [
            dist.new_group(list(ranks[first::tensor]), timeout=datetime.timedelta(seconds=timeout))
            for first in range(tensor)
        ]
        if world.rank in ranks:
            mine = control, replicas[world.tensor_rank]
    assert mine is not None
    replicas_each = world.data_size // count
    return replace(
        world,
        rank=world.rank % size,
        size=size,
        data_rank=world.data_rank % replicas_each,
        data_size=replicas_each,
        control=mine[0],
        data_group=mine[1],
    )


def _memory_of_rank(world: World) -> int:
    """Bytes of this rank's device, or its share of the host's memory."""
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world_size(world.size)
