#!/usr/bin/env python3
"""Switching to a candidate in a live engine, against a training step and against reloading.

python tools/bench/growth/live_switch.py [--hidden 256] [--scratch FOLDER] [--json FILE]

On a GPU candidates are written from the copy of their base in device memory.
"""

import argparse
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch

from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.distributed.world import World, start_world, stop_world
from lag_megatron.engine.base_cache import BaseCache
from lag_megatron.engine.engine import Engine
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.plan import GrowthPlan
from tools.bench.common import synthetic
from tools.bench.common.figures import write_figures

T = TypeVar("T")
LAYERS, HIDDEN, VOCABULARY = 16, 256, 8192
ROUNDS = {"cpu": 7, "cuda": 3}  # a GPU's states are larger, and written to disk in each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="where checkpoints lie")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    world = start_world(tensor=1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        figures = switch_figures(world, Path(folder), hidden=options.hidden)
    stop_world()
    for name, value in figures.items():
        print(f"{name:<28} {value:10.4f}")
    if options.json:
        write_figures(options.json, figures)
    return 0


def switch_figures(world: World, scratch: Path, *, hidden: int = HIDDEN) -> dict[str, float]:
    """Figures of 16 layers and 1024 tokens a step: medians of rounds, each way in turn."""
    seed = synthetic.seed_checkpoint(world, scratch / "seed", hidden=hidden, vocabulary=VOCABULARY)
    topology = ZeroCheckpoint.open(seed).topology
    base = synthetic.stack(seed, scratch / "base", layers=12, topology=topology)
    config = synthetic.config_of(LAYERS, hidden=hidden, vocabulary=VOCABULARY)
    engine = synthetic.engine_of(config, world)
    source, cache = ZeroCheckpoint.open(base), BaseCache.for_device(world.device, local_ranks=1)
    plans = [
        GrowthPlan(
            operator="lag",
            options={"index": index, "block_size": 2, "init": "duplicate"},
            source_layers=12,
            target_layers=LAYERS,
        )
        for index in range(ROUNDS[world.device.type] + 1)
    ]
    seconds: dict[str, list[float]] = {"step": [], "switch": [], "reload": []}
    for number, plan in enumerate(plans):
        _time(seconds["step"], synthetic.train_step, engine, number)
        _time(seconds["switch"], engine.grow_from, GrownState(source, plan), cache)
        grown = scratch / "grown" / synthetic.TAG
        grow_checkpoint(base, grown, plan)
        engine = _time(seconds["reload"], _reload, engine, grown, scratch / "saved")
        synthetic.train_step(engine, number)  # the first step of an engine is not like the others
        for folder in (scratch / "saved", grown.parent):
            shutil.rmtree(folder)
    state = 12 * sum(math.prod(s) for group in engine.parameter_groups() for s in group.values())
    engine.destroy()
    step, switch, reload = (statistics.median(values[1:]) for values in seconds.values())
    return {
        "switch_step_ratio": switch / step,
        "switch_reload_speedup": reload / switch,
        "switch_seconds": switch,
        "switch_gb_s": state / switch / 1e9,
        "step_seconds": step,
    }


def _reload(engine: Engine, grown: Path, saved: Path) -> Engine:
    """A switch without a live engine: save, build anew, load."""
    engine.save(saved, synthetic.TAG, client_state={})
    engine.destroy()
    fresh = synthetic.engine_of(engine.config, engine.world)
    fresh.load(grown)
    return fresh


def _time(seconds: list[float], task: Callable[..., T], *arguments: object) -> T:
    started = time.perf_counter()
    result = task(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
