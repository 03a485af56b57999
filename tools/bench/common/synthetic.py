"""Training states of any size: two layers that DeepSpeed trained and saved, then stacked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.config import ModelConfig, ParallelConfig, RunConfig, StageConfig
from lag_megatron.distributed.world import World
from lag_megatron.engine.engine import Engine
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.planning.random_paths import LayerPath

TAG = "step00000002"
SEED_LAYERS = 2
ROWS, LENGTH = 8, 128


def config_of(num_layers: int, *, hidden: int, vocabulary: int, zero_stage: int = 1) -> RunConfig:
    """A GPT that takes 1024 tokens a step."""
    return RunConfig(
        model=ModelConfig(
            num_layers=num_layers,
            hidden_size=hidden,
            ffn_hidden_size=4 * hidden,
            num_attention_heads=4,
            num_query_groups=4,
            seq_length=LENGTH,
            vocab_size=vocabulary,
        ),
        stages=(StageConfig(steps=10),),
        parallel=ParallelConfig(zero_stage=zero_stage, micro_batch=ROWS, global_batch=ROWS),
    )


def engine_of(config: RunConfig, world: World) -> Engine:
    """An engine with newly initialised weights."""
    size = int(config.model.vocab_size)
    return Engine(config, world, num_layers=config.model.num_layers, vocab_size=size)


def train_step(engine: Engine, step: int, path: LayerPath | None = None) -> float:
    """One step on random tokens; its loss."""
    generator = torch.Generator().manual_seed(step)
    vocabulary = int(engine.config.model.vocab_size)
    text = torch.randint(0, vocabulary, (ROWS, LENGTH + 1), generator=generator)
    batch = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "position_ids": torch.arange(LENGTH).expand(ROWS, LENGTH),
        "loss_mask": torch.ones(ROWS, LENGTH),
    }
    return engine.train_step([batch], step=step, lr=1e-4, path=path).loss


def seed_checkpoint(
    world: World,
    folder: Path,
    *,
    hidden: int,
    vocabulary: int,
    model: Mapping[str, Any] | None = None,
) -> Path:
    """A state of two layers after two steps, as DeepSpeed saves it; ``model`` describes it."""
    engine = engine_of(config_of(SEED_LAYERS, hidden=hidden, vocabulary=vocabulary), world)
    for step in range(2):
        train_step(engine, step)
    engine.save(folder, TAG, client_state={"step": 2, **({"model": dict(model)} if model else {})})
    engine.destroy()
    return folder / TAG


def stack(seed: Path, folder: Path, *, layers: int, topology: Topology) -> Path:
    """A checkpoint of ``layers`` layers that repeat the seed's, sharded for ``topology``."""
    plan = GrowthPlan(operator="interpolate", source_layers=SEED_LAYERS, target_layers=layers)
    grow_checkpoint(seed, folder / TAG, plan, topology=topology, workers=2)
    return folder / TAG


def duplicate_middle_third(layers: int) -> GrowthPlan:
    """The plan that duplicates the middle third of the layers: 12 become 16."""
    options = {"index": layers // 3, "block_size": layers // 3, "init": "duplicate"}
    return GrowthPlan(
        operator="lag", options=options, source_layers=layers, target_layers=layers * 4 // 3
    )
