#!/usr/bin/env python3
"""One candidate as a loop without a coordinator probes it: load, train to the lag, evaluate.

deepspeed --num_gpus 2 tools/bench/search/naive_probe.py --config FILE --checkpoint TAG --folder DIR

Writes the validation loss to DIR/loss.json; naive_search.py starts it once a candidate.
"""

import argparse
import json
from pathlib import Path

from lag_megatron.config import load_config, padded_vocab_size
from lag_megatron.data import BatchLoader, open_prepared, prepare_data
from lag_megatron.distributed.world import start_world, stop_world
from lag_megatron.engine.engine import Engine
from lag_megatron.engine.step_result import mean
from lag_megatron.run.directory import RunDirectory, step_of
from lag_megatron.run.signals import StopFlag
from lag_megatron.training.training_context import TrainingContext


def main() -> int:
    options = _parser().parse_args()
    config = load_config(options.config)
    world = start_world(tensor=config.parallel.tensor)
    run = RunDirectory(options.folder)
    data = world.run_on_rank0(lambda: prepare_data(config.data, cache_dir=run.data_cache))
    data = open_prepared(data.folder)
    vocab_size = padded_vocab_size(data.vocab_size)
    context = TrainingContext(config, run, BatchLoader(data, config, world), StopFlag(), vocab_size)
    engine = Engine(
        config,
        world,
        num_layers=config.layers_of(1),
        vocab_size=vocab_size,
        draw_weights=False,
    )
    engine.load(options.checkpoint)
    base_step = step_of(options.checkpoint.name)
    for step in range(config.growth_before(1).last_rung):
        context.step(engine, base_step + step, stage=1)
    loss = mean(context.evaluate(engine))
    if world.is_coordinator:
        (options.folder / "loss.json").write_text(json.dumps({"val_loss": loss}))
    stop_world()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="grown, a tag directory")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
