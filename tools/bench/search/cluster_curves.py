#!/usr/bin/env python3
"""Curves of this machine's ranks; cluster_measure.py starts this program under the launcher.

deepspeed --num_gpus 4 tools/bench/search/cluster_curves.py --config FILE --base TAG --out FILE
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config import RunConfig, load_config
from lag_megatron.distributed.world import World, start_world, stop_world
from lag_megatron.engine.engine import Engine
from lag_megatron.engine.save import save_engine
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.pool import growth_pools
from lag_megatron.planning.vocab_size import estimate_vocab_size
from lag_megatron.search.rank_groups import split_world

ROUNDS = 5
ROWS = (1, 2, 4, 8)
SIZES = (1 << 16, 1 << 20, 1 << 24)


def main() -> int:
    options = _parser().parse_args()
    config = load_config(options.config)
    world = start_world(tensor=1)
    alone = split_world(world, world.size, timeout=config.parallel.timeout)
    found = {
        "all_reduce": list(_all_reduces(world, config)),
        **_passes(world, alone, config),
        **_states(world, alone, config, options.base, options.out.parent / "saved"),
    }
    if world.is_coordinator:
        options.out.write_text(json.dumps(found, indent=1))
    stop_world()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint to grow")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _all_reduces(world: World, config: RunConfig) -> Iterator[tuple[int, int, float]]:
    """Number of ranks, bytes and seconds of each all-reduce; the other ranks wait meanwhile."""
    for count in (world.size // 2, 1):
        part = split_world(world, count, timeout=config.parallel.timeout)
        for size in SIZES:
            tensor = torch.zeros(size // 4)
            work = world.rank < part.size
            seconds = _timed(
                world, work, lambda t=tensor, g=part.data_group: dist.all_reduce(t, group=g)
            )
            yield part.size, size, seconds


def _passes(world: World, alone: World, config: RunConfig) -> dict[str, object]:
    """Seconds of a rank's step by rows of a micro-batch, of its optimizer, and under contention."""
    parallel = config.parallel
    one = replace(config, parallel=replace(parallel, global_batch=parallel.micro_batch))
    accumulated = parallel.global_batch // parallel.micro_batch
    steps: dict[int, float] = {}
    slower: list[tuple[int, float]] = []
    engine = _engine(config, alone)
    for rows in ROWS:
        batches = [_batch(config, rows) for _ in range(accumulated)]
        steps[rows] = _timed(world, world.rank == 0, _step, engine, batches)
    batches = [_batch(config, ROWS[-1]) for _ in range(accumulated)]
    for busy in range(1, world.size + 1):
        if world.size % busy == 0:
            seconds = _timed(world, world.rank < busy, _step, engine, batches)
            slower.append((busy, seconds))
    engine.destroy()
    engine = _engine(one, alone)
    single = _timed(world, world.rank == 0, _step, engine, [_batch(config, parallel.micro_batch)])
    engine.destroy()
    # A step is its passes and the optimizer: two numbers of passes tell them apart.
    full = (steps[parallel.micro_batch] - single) / (accumulated - 1)
    optimizer = max(single - full, 0.0)
    length = config.model.seq_length
    return {
        "compute": [(r * length, (s - optimizer) / accumulated) for r, s in steps.items()],
        "optimizer_seconds": optimizer,
        "contention": [(busy, seconds / slower[0][1]) for busy, seconds in slower],
    }


def _states(
    world: World, alone: World, config: RunConfig, base: Path, saved: Path
) -> dict[str, float]:
    """Bytes a second at which one rank takes over a state and saves it."""
    engine = _engine(config, alone)
    plan = growth_pools(config)[1][0].plan
    growth = GrownState(ZeroCheckpoint.open(base), plan, engine.topology)
    size = engine.bytes_on_disk
    work = world.rank == 0
    taking = _timed(world, work, engine.grow_from, growth)

    def save() -> None:
        shutil.rmtree(saved, ignore_errors=True)
        save_engine(engine, saved / "step00000001", step=1, tokens=1, history=[], growth=growth)

    saving = _timed(world, work, save)
    engine.destroy()
    return {"state_rate": size / taking, "save_rate": size / saving}


def _engine(config: RunConfig, world: World) -> Engine:
    vocab_size, _ = estimate_vocab_size(config)
    return Engine(config, world, num_layers=config.layers_of(1), vocab_size=vocab_size)


def _step(engine: Engine, batches: list[dict[str, torch.Tensor]]) -> None:
    engine.train_step(batches, step=0, lr=1e-5)


def _batch(config: RunConfig, rows: int) -> dict[str, torch.Tensor]:
    length = config.model.seq_length
    vocab_size, _ = estimate_vocab_size(config)
    text = torch.randint(0, vocab_size, (rows, length + 1))
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "position_ids": torch.arange(length).expand(rows, length),
        "loss_mask": torch.ones(rows, length),
    }


def _timed(world: World, work: bool, task: Callable[..., object], *arguments: object) -> float:
    """Median seconds of the slowest rank, over rounds that all working ranks begin together."""
    seconds: list[float] = []
    for number in range(ROUNDS + 1):
        world.barrier()
        started = time.perf_counter()
        if work:
            task(*arguments)
        spent = time.perf_counter() - started if work else 0.0
        slowest = max(world.gather(spent))
        if number:  # the first warms up
            seconds.append(slowest)
    return statistics.median(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
