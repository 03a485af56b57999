#!/usr/bin/env python3
"""The optimizer's step under ZeRO-1, against one pass of torch's fused AdamW and a cast.

python tools/bench/training/optimizer.py [--rounds 9] [--json FILE]

One rank and one thread; process time, medians of rounds in which all sides run in turns.  Ours and
DeepSpeed's step take the norm of the gradients, clip them, join and cast them, update masters and
moments and write the bf16 weights; the pass beside them finds fp32 gradients that are joined
already, and clips nothing.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch

from lag_megatron.distributed.world import World, start_world, stop_world
from lag_megatron.engine.engine import Engine
from lag_megatron.model import loss_sums
from tools.bench.common.figures import write_figures
from tools.bench.training.step_job import LR, SHAPES, StepJob

SHAPE = "small"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = start_world(tensor=1)
    figures: dict[str, float] = {}
    for dtype in ("bf16", "fp32"):
        sides = {
            "one_pass": _engines_step(world, dtype, one_pass=True),
            "deepspeed": _engines_step(world, dtype, one_pass=False),
            "fused": _fused_and_cast(dtype, _count(world, dtype)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(1 + options.rounds):
            for name, side in sides.items():
                taken = side()
                if number:
                    seconds[name].append(taken)
        times = {name: statistics.median(values) for name, values in seconds.items()}
        figures |= {f"{dtype}_{name}_ms": 1e3 * value for name, value in times.items()}
        figures[f"optimizer_vs_fused_{dtype}"] = times["one_pass"] / times["fused"]
        figures[f"deepspeed_vs_fused_{dtype}"] = times["deepspeed"] / times["fused"]
    stop_world()
    figures["optimizer_vs_fused"] = figures["optimizer_vs_fused_bf16"]
    for name, value in figures.items():
        print(f"{name:<26} {value:10.3f}")
    if options.json:
        write_figures(options.json, figures)
    return 0


def _engine(world: World, dtype: str, *, one_pass: bool) -> Engine:
    config = StepJob(SHAPE, dtype, Path(), "cpu", profile=False).config
    optimizer = dataclasses.replace(config.optimizer, one_pass=one_pass)
    config = dataclasses.replace(config, optimizer=optimizer)
    layers = config.model.num_layers
    return Engine(config, world, num_layers=layers, vocab_size=SHAPES[SHAPE].vocabulary)


def _engines_step(world: World, dtype: str, *, one_pass: bool) -> Callable[[], float]:
    """A step after gradients of a small batch; only the step is timed."""
    engine = _engine(world, dtype, one_pass=one_pass).deepspeed_engine
    for group in engine.optimizer.param_groups:
        group["lr"] = LR
    tokens = torch.randint(SHAPES[SHAPE].vocabulary, (1, 16), generator=torch.Generator())
    batch = {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": torch.arange(16)[None],
        "loss_mask": torch.ones(1, 16),
    }

    def side() -> float:
        engine.backward(loss_sums(engine, batch).sum() / 16)
        started = time.process_time()
        engine.step()
        return time.process_time() - started

    return side


def _fused_and_cast(dtype: str, count: int) -> Callable[[], float]:
    master = torch.randn(count).requires_grad_()
    weights = master.detach().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW([master], lr=LR, fused=True)
    master.grad = torch.randn(count)

    def side() -> float:
        started = time.process_time()
        optimizer.step()
        weights.copy_(master.detach())
        return time.process_time() - started

    return side


def _count(world: World, dtype: str) -> int:
    return sum(p.numel() for p in _engine(world, dtype, one_pass=True).module.parameters())


if __name__ == "__main__":
    raise SystemExit(main())
