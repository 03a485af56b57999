#!/usr/bin/env python3
"""The time of a training step against the length of its path.

python tools/bench/training/raptr.py [--rounds 7] [--precision fp32|bf16] [--json FILE]

24 layers of width 256, vocabulary 4096, one rank, ZeRO-1; a GPU where there is one, else one thread
of the CPU, whose process time is taken.  Each round takes a step of every length, on another path
each time; medians over the rounds, the first left out.  ``raptr_step_ratio`` is the time of half
the layers over that of all; the ratio of their FLOPs is printed beside it.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch

from lag_megatron.config import RunConfig
from lag_megatron.distributed.world import start_world, stop_world
from lag_megatron.engine.engine import Engine
from lag_megatron.planning.cost import steps_flops
from lag_megatron.planning.random_paths import path_at, with_path_length
from tools.bench.common import synthetic
from tools.bench.common.figures import write_figures

LAYERS, HIDDEN, VOCABULARY = 24, 256, 4096
LENGTHS = (24, 18, 12, 6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = start_world(tensor=1)
    config = synthetic.config_of(LAYERS, hidden=HIDDEN, vocabulary=VOCABULARY)
    parallel = dataclasses.replace(config.parallel, precision=options.precision)
    stage = dataclasses.replace(config.stages[0], steps=(1 + options.rounds) * len(LENGTHS))
    config = dataclasses.replace(config, parallel=parallel, stages=(stage,))
    engine = synthetic.engine_of(config, world)
    seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for number in range(1 + options.rounds):
        for length in LENGTHS:
            taken = _timed_step(engine, with_path_length(config, 0, length), number)
            if number:
                seconds[length].append(taken)
    stop_world()
    figures = _figures(config, seconds)
    if options.json:
        write_figures(options.json, figures)
    return 0


def _timed_step(engine: Engine, config: RunConfig, step: int) -> float:
    on_gpu = engine.world.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    started = clock()
    synthetic.train_step(engine, step, path_at(step, config))
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - started


def _figures(config: RunConfig, seconds: dict[int, list[float]]) -> dict[str, float]:
    """Prints the table and returns it by name."""
    times = {length: statistics.median(values) for length, values in seconds.items()}
    flops = {
        length: steps_flops(with_path_length(config, 0, length), range(1), vocab_size=VOCABULARY)
        for length in LENGTHS
    }
    figures: dict[str, float] = {}
    print(f"{'layers run':>10} {'ms a step':>10} {'of all':>7} {'FLOPs':>7}")
    for length, taken in times.items():
        ratio, share = taken / times[LAYERS], flops[length] / flops[LAYERS]
        print(f"{length:>10} {1e3 * taken:>10.1f} {ratio:>7.3f} {share:>7.3f}")
        figures[f"raptr_{length}_ms"] = 1e3 * taken
        figures[f"raptr_{length}_flops_ratio"] = share
    figures["raptr_step_ratio"] = times[LAYERS // 2] / times[LAYERS]
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
