"""Probe groups: parts of the run's ranks, each of which trains a candidate of its own."""

import contextlib
import datetime
import functools
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist

from lag_megatron.distributed.world import CONTROL_TIMEOUT, World, local_world_size
from lag_megatron.engine.engine import Engine
from lag_megatron.engine.training_context import Job
from lag_megatron.planning.cost import parameter_count, state_bytes_per_parameter
from lag_megatron.search.event import Event
from lag_megatron.search.worker import ProbeGroup

# What activations, logits and DeepSpeed's buffers leave of a device for the training state.
_STATE_SHARE = 0.6
_ACCUMULATION = "gradient_accumulation_steps"


def count_groups(job: Job, world: World, event: Event) -> int:
    """How many candidates are probed at a time; collective.

    ``auto`` is the largest number that divides the data-parallel replicas, leaves no group idle
    from the start, and whose ranks can hold the state: ZeRO spreads it over a group alone.  A
    given number is at most what leaves none idle.
    """
    return world.run_on_rank0(lambda: _count(job, world, event))


def _count(job: Job, world: World, event: Event) -> int:
    wanted, replicas, candidates = event.growth.probe_groups, world.data_size, len(event.pool)
    divisors = [count for count in range(1, replicas + 1) if replicas % count == 0]
    busy = [count for count in divisors if count <= candidates]
    if wanted != "auto":
        return min(int(wanted), busy[-1])
    parameters = parameter_count(
        job.config.model,
        num_layers=event.target_layers,
        vocab_size=job.vocab_size,
        tensor=world.tensor_size,
    )
    room = _STATE_SHARE * _memory_of_rank(world)

    def fits(count: int) -> bool:
        widths = state_bytes_per_parameter(
            job.config.parallel, replicas=replicas // count, optimizer=job.config.optimizer.name
        )
        width = sum(widths.values())
        if event.growth.compared_by == "ema":  # the average of the fp32 weights lies beside them
            width += 4 / (replicas // count if job.config.parallel.zero_stage else 1)
        return parameters * width <= room

    return max((count for count in busy if fits(count)), default=1)


@contextlib.contextmanager
def part_of(job: Job, world: World, event: Event, count: int) -> Iterator[ProbeGroup]:
    """This rank's probe group of ``count``, with an engine on its ranks; collective."""
    part = split_world(world, count, timeout=job.config.parallel.timeout)
    # What the user wrote of accumulation is true of all ranks together.
    deepspeed = {k: v for k, v in job.config.deepspeed.items() if k != _ACCUMULATION}
    parallel = replace(job.config.parallel, world_size=None)
    config = replace(job.config, parallel=parallel, deepspeed=deepspeed)
    engine = Engine(
        config,
        part,
        num_layers=event.target_layers,
        vocab_size=job.vocab_size,
        draw_weights=False,
    )
    group = ProbeGroup(replace(job, feed=job.feed.on(part)), engine, event, count=count)
    yield group
    group.release()
    engine.destroy()


@functools.cache  # process groups are never given back, so an event takes those of the one before
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
