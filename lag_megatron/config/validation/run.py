"""Checks of a whole configuration beyond the types of its values."""

from collections.abc import Iterator

from lag_megatron.config.schema.parallel import ParallelConfig, data_parallel_size
from lag_megatron.config.schema.param_names import parse_param_names
from lag_megatron.config.schema.run import GrowthConfig, PoolConfig, RunConfig
from lag_megatron.config.validation.data import data_problems
from lag_megatron.config.validation.model import model_problems
from lag_megatron.config.validation.optimizer import optimizer_problems
from lag_megatron.config.validation.random_paths import path_problems
from lag_megatron.config.validation.ranges import range_problems
from lag_megatron.config.validation.stages import position_problems
from lag_megatron.errors import ConfigError


def find_problems(config: RunConfig) -> list[str]:
    """Every contradiction inside ``config``, one line each, with its dotted path."""
    return [
        *range_problems(config),
        *model_problems(config),
        *_parallel(config.parallel),
        *_graphs(config),
        *data_problems(config),
        *optimizer_problems(config),
        *_stages(config),
        *position_problems(config),
        *path_problems(config),
        *_names(config),
    ]


def check_probe_groups(config: RunConfig, *, world_size: int) -> None:
    """Check that each event's probe groups divide the data-parallel replicas evenly.

    Raises:
        ConfigError: if some event's number of groups does not divide the data-parallel replicas.
    """
    replicas = data_parallel_size(config.parallel, world_size=world_size)
    for stage in range(1, len(config.stages)):
        wanted = config.growth_before(stage).probe_groups
        tried = config.has_event(stage)
        if tried and wanted != "auto" and (wanted > replicas or replicas % wanted):
            where = f"stages.{stage}.growth" if config.stages[stage].growth else "growth"
            divisors = [count for count in range(1, replicas + 1) if replicas % count == 0]
            raise ConfigError(
                f"{where}.probe_groups: {wanted} groups cannot share {replicas} data-parallel "
                f"replicas evenly. Take one of {divisors}, or auto."
            )


def _names(config: RunConfig) -> Iterator[str]:
    parts = [("growth", config.growth)]
    parts += [(f"stages.{n}.growth", s.growth) for n, s in enumerate(config.stages) if s.growth]
    seen: list[object] = [None]
    for where, growth in parts:
        if growth.names not in seen:
            try:
                parse_param_names(growth.names, where=f"{where}.names")
            except ConfigError as error:
                yield str(error)
        seen.append(growth.names)


def _parallel(parallel: ParallelConfig) -> Iterator[str]:
    sizes = (parallel.tensor, parallel.micro_batch, parallel.global_batch, parallel.world_size or 0)
    if min(sizes) > 0:
        try:
            data_parallel_size(parallel, world_size=sizes[-1])
        except ConfigError as error:
            yield str(error)


def _graphs(config: RunConfig) -> Iterator[str]:
    """Settings under which a layer cannot be replayed: a graph has fixed addresses and numbers."""
    parallel = config.parallel
    if not parallel.cuda_graphs:
        return
    scale = config.raptr.scale if config.has_paths else "none"  # it is part of what is recorded
    for key, value, allowed in (
        ("raptr.scale", scale, ("none",)),
        ("parallel.zero_stage", parallel.zero_stage, (0, 1, 2)),
        ("parallel.tensor", parallel.tensor, (1,)),
        ("parallel.recompute", parallel.recompute, ("none",)),
        ("model.dropout", config.model.dropout, (0.0,)),
    ):
        if value not in allowed:
            choices = " or ".join(str(choice) for choice in allowed)
            yield (
                f"parallel.cuda_graphs: layers cannot be replayed with {key} {value}; it has to be "
                f"{choices}. Change it, or set parallel.cuda_graphs: false."
            )


def _stages(config: RunConfig) -> Iterator[str]:
    for number, stage in enumerate(config.stages):
        layers = config.layers_of(number)
        if number == 0:
            if layers != config.model.num_layers:
                yield (
                    "stages.0.num_layers: the first stage has the model's "
                    f"{config.model.num_layers} layers (got {layers})."
                )
            if stage.growth is not None:
                yield "stages.0.growth: nothing grows before the first stage. Remove the key."
        elif layers < config.layers_of(number - 1):
            yield (
                f"stages.{number}.num_layers: {layers} is fewer than the "
                f"{config.layers_of(number - 1)} of the stage before; stages only grow."
            )
        elif config.has_event(number):
            where = f"stages.{number}.growth" if stage.growth else "growth"
            growth = config.growth_before(number)
            yield from growth_problems(growth, where, stage.steps)
            if growth.pool.operator == "post_ln_identity" and config.model.norm_position == "pre":
                yield (
                    f"{where}.pool.operator: 'post_ln_identity' is for post-LN models, but "
                    "model.norm_position is 'pre'. Take 'llama_pro'."
                )
            if growth.pool.operator == "staged" and config.model.norm_position == "post":
                yield (
                    f"{where}.pool.operator: 'staged' is for pre-LN models, but "
                    "model.norm_position is 'post'. Take 'post_ln_identity'."
                )


def growth_problems(growth: GrowthConfig, where: str, steps: int) -> Iterator[str]:
    """Every contradiction in the settings of a growth event, one line each.

    Args:
        growth: the settings.
        where: their dotted path.
        steps: length of the stage that follows, in optimizer steps.
    """
    if list(growth.rungs) != sorted(set(growth.rungs)) or any(r <= 0 for r in growth.rungs):
        yield f"{where}.rungs: must be positive and strictly rising (got {list(growth.rungs)})."
    elif growth.lag == "auto" and len(growth.rungs) < 3:
        yield (
            f"{where}.rungs: lag auto looks for the phase transition at the rungs, so at least "
            f"three are needed (got {list(growth.rungs)})."
        )
    elif growth.lag != "auto" and growth.rungs and growth.rungs[-1] != growth.lag:
        yield f"{where}.rungs: the last rung {growth.rungs[-1]} must be the lag {growth.lag}."
    elif growth.last_rung > steps:
        name = "rungs" if growth.lag == "auto" else "lag"
        yield (
            f"{where}.{name}: {growth.last_rung} is longer than the stage that follows "
            f"({steps} steps)."
        )
    else:
        last, end = ("stage's end", steps) if growth.exhaustive else ("lag", growth.last_rung)
        if any(not 0 <= step <= end for step in growth.eval_steps):
            yield (
                f"{where}.eval_steps: must lie between 0 and the {last} {end} "
                f"(got {list(growth.eval_steps)})."
            )
    yield from _pool(growth.pool, f"{where}.pool")


def _pool(pool: PoolConfig, where: str) -> Iterator[str]:
    if not pool.init:
        yield f"{where}.init: at least one of duplicate, random is needed."
    if not pool.scale or any(not 0 <= scale <= 1 for scale in pool.scale):
        yield f"{where}.scale: one or more numbers from 0 to 1 are needed (got {list(pool.scale)})."
    if pool.operator == "lag" and pool.options:
        yield (
            f"{where}.options: the operator 'lag' takes index, block_size, init and scale beside "
            f"operator (got {pool.options}). Move them there."
        )
    if pool.operator != "lag" and pool.scale != (1.0,):
        yield (
            f"{where}.scale: is an axis of the operator 'lag' (got {list(pool.scale)} for "
            f"{pool.operator!r}). Leave it out; others take a scale under options, if they have "
            "one."
        )
