"""A candidate switched in a live engine against a training step, and against reloading."""

import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import synthetic

from lag_megatron.checkpoint.zero import ZeroCheckpoint
from lag_megatron.engine import Engine
from lag_megatron.growth.materialize import Growth
from lag_megatron.growth.offline import grow_checkpoint
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.parallel import World

T = TypeVar("T")
LAYERS, HIDDEN, VOCABULARY = 16, 256, 8192
ROUNDS = 7


def switch_figures(world: World, scratch: Path) -> dict[str, float]:
    """16 layers of 256, 1024 tokens a step; medians of rounds in which each way has its turn."""
    seed = synthetic.seed_checkpoint(world, scratch / "seed", hidden=HIDDEN, vocabulary=VOCABULARY)
    topology = ZeroCheckpoint.open(seed).topology
    base = synthetic.stack(seed, scratch / "base", layers=12, topology=topology)
    config = synthetic.config_of(LAYERS, hidden=HIDDEN, vocabulary=VOCABULARY)
    engine = synthetic.engine_of(config, world)
    source = ZeroCheckpoint.open(base)
    plans = [
        GrowthPlan(
            operator="lag",
            options={"index": index, "block_size": 2, "init": "duplicate"},
            source_layers=12,
            target_layers=LAYERS,
        )
        for index in range(ROUNDS + 1)
    ]
    seconds: dict[str, list[float]] = {"step": [], "switch": [], "reload": []}
    for number, plan in enumerate(plans):
        _time(seconds["step"], synthetic.train_step, engine, number)
        _time(seconds["switch"], engine.grow_from, Growth(source, plan))
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
    """What a search without live switches does: save, build anew, load."""
    engine.save(saved, synthetic.TAG, client_state={})
    engine.destroy()
    fresh = synthetic.engine_of(engine.config, engine.world)
    fresh.load(grown)
    return fresh


def _time(seconds: list[float], task: Callable[..., T], *arguments: object) -> T:
    started = time.perf_counter()
    result = task(*arguments)
    seconds.append(time.perf_counter() - started)
    return result
