"""Typed, strict configuration."""

from lag_megatron.config.check import data_parallel_size, require_groups
from lag_megatron.config.load import dump_config, load_config, parse_config
from lag_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    GrowthConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PoolConfig,
    RunConfig,
    StageConfig,
    TrackingConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "GrowthConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PoolConfig",
    "RunConfig",
    "StageConfig",
    "TrackingConfig",
    "data_parallel_size",
    "dump_config",
    "load_config",
    "parse_config",
    "require_groups",
]
