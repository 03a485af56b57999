"""Building the model and DeepSpeed's engine around it: the only module that imports deepspeed."""

import contextlib
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

# DeepSpeed builds its CPU communication op with ninja; without the environment's bin folder on the
# PATH (the launcher called by its full path) that fails.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed

import deepspeed

from lag_megatron.config import RunConfig
from lag_megatron.config.deepspeed import deepspeed_config
from lag_megatron.distributed.world import DeepSpeedGroups, World
from lag_megatron.engine.deepspeed_adapter import full_shape
from lag_megatron.model import build_model
from lag_megatron.model.cuda_graphs import capture_layers
from lag_megatron.model.initialize import initialize_weights, mark_cut_parameters
from lag_megatron.model.parameter_groups import make_optimizer
from lag_megatron.model.random_state import seed_everywhere
from lag_megatron.run.compile_cache import remove_stale_locks


def build_deepspeed_engine(
    config: RunConfig, world: World, *, num_layers: int, vocab_size: int, draw_weights: bool
) -> Any:
    """What ``deepspeed.initialize`` makes of a model of ``num_layers``; a collective call.

    Weights depend on ``config.seed`` and the shape alone.  Without ``draw_weights`` they have no
    defined values.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings, groups = deepspeed_config(config, world_size=world.size), DeepSpeedGroups(world)
    remove_stale_locks()
    deepspeed.init_distributed()
    seed_everywhere(config.seed)
    sharded = config.parallel.zero_stage == 3
    with _sharded_construction(settings, groups) if sharded else contextlib.nullcontext():
        model = build_model(
            config.model, config.parallel, num_layers=num_layers, vocab_size=vocab_size
        )
    mark_cut_parameters(model)
    if config.parallel.cuda_graphs:
        capture_layers(model)
    if draw_weights:
        gathered = partial(_gathered, sharded=sharded)
        initialize_weights(model, config, world, num_layers=num_layers, gathered=gathered)
    # The learning rate is 0 until the first step sets it: DeepSpeed's 16-bit ZeRO-0 optimizer
    # takes a step while it is built.
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, config.optimizer, shape_of=full_shape),
        config=settings,
        mpu=groups,
        dist_init_required=False,
    )
    return engine


def _sharded_construction(settings: dict[str, Any], groups: DeepSpeedGroups) -> Any:
    """Under ZeRO-3 each parameter is cut as soon as it exists, so no rank holds the model."""
    return deepspeed.zero.Init(
        data_parallel_group=groups.get_data_parallel_group(),
        config_dict_or_path=settings,
        mpu=groups,
    )


def _gathered(parameter: torch.nn.Parameter, *, sharded: bool) -> Any:
    """Make a parameter whole while it is written; replicas then take replica 0's."""
    if not sharded:
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)
