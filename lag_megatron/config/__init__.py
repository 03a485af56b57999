"""The configuration of a run: read from YAML into frozen dataclasses, with every error reported."""

from lag_megatron.config.load import dump_config, load_config, parse_config, parse_growth
from lag_megatron.config.schema.data import (
    DataConfig,
    MlmConfig,
    SourceConfig,
    TokenizerConfig,
    Ul2Config,
)
from lag_megatron.config.schema.model import ModelConfig, padded_vocab_size
from lag_megatron.config.schema.optimizer import OptimizerConfig, ScheduleConfig
from lag_megatron.config.schema.parallel import ParallelConfig, data_parallel_size
from lag_megatron.config.schema.run import (
    CheckpointConfig,
    GrowthConfig,
    PoolConfig,
    RunConfig,
    StageConfig,
    TrackingConfig,
    WandbConfig,
)
from lag_megatron.config.validation.run import check_probe_groups

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "GrowthConfig",
    "MlmConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PoolConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "Ul2Config",
    "WandbConfig",
    "check_probe_groups",
    "data_parallel_size",
    "dump_config",
    "load_config",
    "padded_vocab_size",
    "parse_config",
    "parse_growth",
]
