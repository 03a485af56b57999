"""Candidates that an engine switches between: ``from switching import PLANS, same_files``."""

import dataclasses

import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks, train_and_save
from full_state import tree_differences

from lag_megatron.growth.plan import GrowthPlan

PLANS = {
    "duplicate": GrowthPlan(
        operator="lag",
        options={"index": 0, "block_size": 1, "init": "duplicate"},
        source_layers=2,
        target_layers=4,
    ),
    "random": GrowthPlan(
        operator="lag",
        options={"index": 0, "block_size": 2, "init": "random"},
        source_layers=2,
        target_layers=4,
    ),
    "scaled": GrowthPlan(operator="last", options={"scale": 0.3}, source_layers=2, target_layers=4),
}
# No page ends where a parameter does.
PAGE = 1000


def config_of(stage, precision, tensor, layers=2, weight_decay=0.1):
    config = pico_config(zero_stage=stage, precision=precision, tensor=tensor, num_layers=layers)
    parallel = dataclasses.replace(config.parallel, global_batch=12)
    optimizer = dataclasses.replace(config.optimizer, weight_decay=weight_decay)
    # ZeRO-3 would keep parameters as small as these whole on every rank.
    cut = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return dataclasses.replace(
        config,
        parallel=parallel,
        optimizer=optimizer,
        deepspeed=cut if stage == 3 and precision == "fp32" else {},
    )


def save_base(tmp_path_factory):
    """A fixture: a checkpoint of another number of ranks than the engines have."""
    folder = tmp_path_factory.mktemp("base")
    run_ranks(train_and_save, 3, config_of(1, "fp32", 1, weight_decay=0.3), folder)
    return folder / "step3"


def probe(engine, config, world, first=3, count=2):
    return [
        engine.train_step(random_batches(config, world, step), step=step, lr=1e-2)
        for step in range(first, first + count)
    ]


def switch_in_place(config, base, folder):
    """On each rank: what differs between a candidate from disk and one grown in place."""
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine
    from lag_megatron.growth.apply.grow_zero import grow_checkpoint
    from lag_megatron.growth.apply.grown_state import GrownState

    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(config, world, num_layers=4, vocab_size=PICO_VOCABULARY)
    losses = {}
    for name, plan in PLANS.items():
        growth = GrownState(ZeroCheckpoint.open(base), plan, engine.topology)
        if world.is_coordinator:
            grow_checkpoint(base, folder / name, plan, topology=engine.topology)
        world.barrier()
        engine.load(folder / name)
        engine.save(folder, f"{name}-loaded", client_state={})
        loaded = probe(engine, config, world)
        engine.grow_from(growth)  # over a state that has moved on
        engine.save(folder, f"{name}-grown", client_state={})
        grown = probe(engine, config, world)
        validation = [random_batches(config, world, 99)]
        losses_there = engine.evaluate(validation)
        engine.save(folder, f"{name}-saved", client_state={})
        written = folder / f"{name}-written"
        written.mkdir(exist_ok=True)
        world.barrier()
        files = engine.state.write(written, growth, client_state={})
        assert all((written / file).stat().st_size == e["size"] for file, e in files.items())
        losses[name] = ([r.loss for r in loaded], [r.loss for r in grown])
        next_loss = probe(engine, config, world, 5, 1)[0].loss
        world.barrier()
        engine.load(written)
        assert engine.evaluate(validation) == losses_there
        assert probe(engine, config, world, 5, 1)[0].loss == next_loss
    stop_world()
    return losses


def small_cache(limit=float("inf")):
    from lag_megatron.engine.base_cache import BaseCache, MemoryTier

    return BaseCache([MemoryTier("memory", lambda: limit, torch.empty)], page=PAGE)


def switch_from_cache(config, base, folder, plans):
    """On each rank: losses after both ways of switching, and what of the second was written."""
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine import state as state_module
    from lag_megatron.engine.base_cache import BaseCache
    from lag_megatron.engine.engine import Engine
    from lag_megatron.growth.apply.grown_state import GrownState

    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(config, world, num_layers=4, vocab_size=PICO_VOCABULARY)
    cache, launches = BaseCache.for_device(world.device, local_ranks=1) or small_cache(), []
    write_runs = state_module.write_runs
    state_module.write_runs = lambda runs: (launches.append(len(runs)), write_runs(runs))
    engine.grow_from(
        GrownState(ZeroCheckpoint.open(base), PLANS["duplicate"], engine.topology), cache
    )
    assert launches == []  # the first is taken from the shards
    losses = {}
    for name, plan in plans.items():
        growth = GrownState(ZeroCheckpoint.open(base), plan, engine.topology)
        engine.grow_from(growth)
        engine.save(folder, f"{name}-shards", client_state={})
        there = [result.loss for result in probe(engine, config, world)]
        engine.grow_from(growth, cache)  # over a state that has moved on
        engine.save(folder, f"{name}-cached", client_state={})
        losses[name] = there, [result.loss for result in probe(engine, config, world)]
    assert len(launches) == len(plans)
    assert all(launches)
    stop_world()
    return losses


def same_files(one, other):
    """How many files of two tag folders hold the same objects; it has to be all of them."""
    names = sorted(path.name for path in one.glob("*.pt"))
    assert names == sorted(path.name for path in other.glob("*.pt"))
    for name in names:
        pair = [
            torch.load(folder / name, weights_only=False, map_location="cpu")
            for folder in (one, other)
        ]
        found = [d for d in tree_differences(*pair) if not d.startswith(("/lag/", "/ds_config"))]
        assert found == [], (one.name, other.name, name)
    return len(names)
