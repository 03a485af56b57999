"""Checks of the ranges of single numbers that no other check of their section looks at."""

import math
from collections.abc import Iterator

from lag_megatron.config.schema.ranges import (
    MAX_INTEGER,
    MAX_LAYERS,
    MAX_RANKS,
    MAX_SECONDS,
    MAX_SEQ_LENGTH,
    MAX_VOCAB_SIZE,
)
from lag_megatron.config.schema.run import GrowthConfig, RunConfig


def range_problems(config: RunConfig) -> Iterator[str]:
    """Numbers of a configuration outside their range, one line each."""
    yield from _positive(config)
    yield from _limits(config)
    if not 0 < config.parallel.timeout <= MAX_SECONDS:
        yield (
            f"parallel.timeout: must be above 0 and at most {MAX_SECONDS:,} seconds "
            f"(got {config.parallel.timeout})."
        )
    inherited = list(growth_range_problems(config.growth, "growth"))
    yield from inherited
    for number, stage in enumerate(config.stages):
        where = f"stages.{number}"
        if stage.growth is not None:
            for line in growth_range_problems(stage.growth, f"{where}.growth"):
                if line.removeprefix(f"{where}.") not in inherited:
                    yield line


def _positive(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    values = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
        "model.rotary_base": model.rotary_base,
        "model.norm_eps": model.norm_eps,
        "model.init_std": model.init_std,
        "data.validation_tokens": config.data.validation_tokens,
        "parallel.micro_batch": parallel.micro_batch,
        "parallel.global_batch": parallel.global_batch,
        "optimizer.lr": config.optimizer.lr,
        "optimizer.eps": config.optimizer.eps,
        "checkpoint.interval": config.checkpoint.interval,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "tracking.validation_interval": config.tracking.validation_interval,
        "tracking.log_interval": config.tracking.log_interval,
    }
    for path, value in values.items():
        if not 0 < value < math.inf:
            yield f"{path}: must be above 0 and finite (got {value})."


def _limits(config: RunConfig) -> Iterator[str]:
    """Numbers with a largest value: beyond it loops over them would not end in a lifetime."""
    model, parallel, data = config.model, config.parallel, config.data
    size = 1 if model.vocab_size == "auto" else model.vocab_size
    values: dict[str, tuple[int, int, int]] = {
        "model.num_layers": (model.num_layers, 1, MAX_LAYERS),
        "model.seq_length": (model.seq_length, 1, MAX_SEQ_LENGTH),
        "model.vocab_size": (size, 1, MAX_VOCAB_SIZE),
        "data.tokenizer.vocab_size": (data.tokenizer.vocab_size, 1, MAX_VOCAB_SIZE),
        "data.seed": (data.seed, 0, MAX_INTEGER),
        "parallel.tensor": (parallel.tensor, 1, MAX_RANKS),
        "parallel.world_size": (
            1 if parallel.world_size is None else parallel.world_size,
            1,
            MAX_RANKS,
        ),
        "seed": (config.seed, 0, MAX_INTEGER),
        **{
            f"stages.{number}.num_layers": (stage.num_layers, 1, MAX_LAYERS)
            for number, stage in enumerate(config.stages)
            if stage.num_layers is not None
        },
    }
    for path, (value, least, most) in values.items():
        if value < least:
            yield f"{path}: must be {least} or more (got {value})."
        elif value > most:
            yield f"{path}: must be at most {most:,} (got {value:,})."


def growth_range_problems(growth: GrowthConfig, where: str) -> Iterator[str]:
    """Numbers of a growth event's settings outside their range, one line each."""
    if growth.max_loss <= 0:
        yield f"{where}.max_loss: must be above 0 nats (got {growth.max_loss})."
    if growth.lag != "auto" and growth.lag < 0:
        yield f"{where}.lag: must not be negative (got {growth.lag})."
    yield from _halving(growth, where)
    pool = growth.pool
    for name, value, least in (("index", pool.index, 0), ("block_size", pool.block_size, 1)):
        given = value if isinstance(value, tuple) else (value,)
        if wrong := [number for number in given if isinstance(number, int) and number < least]:
            yield f"{where}.pool.{name}: must be {least} or more (got {wrong[0]})."
        if not given:
            yield f"{where}.pool.{name}: at least one is needed, or 'all'."


def _halving(growth: GrowthConfig, where: str) -> Iterator[str]:
    if growth.eta < 2:
        yield f"{where}.eta: must be 2 or more (got {growth.eta})."
    if not -1 <= growth.rank_bar <= 1:
        yield (
            f"{where}.min_rank_correlation: must lie between -1 and 1 "
            f"(got {growth.min_rank_correlation})."
        )
    if growth.probe_groups != "auto" and growth.probe_groups < 1:
        yield f"{where}.probe_groups: must be 1 or more, or auto (got {growth.probe_groups})."
    if growth.rung_timeout is not None and not 0 < growth.rung_timeout <= MAX_SECONDS:
        yield (
            f"{where}.rung_timeout: must be above 0 and at most {MAX_SECONDS:,} seconds, or null "
            f"for no limit (got {growth.rung_timeout})."
        )
