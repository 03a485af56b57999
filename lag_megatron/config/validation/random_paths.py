"""Checks of Random Path Training: lengths, probabilities and candidates' paths."""

from collections.abc import Iterator

from lag_megatron.config.schema.raptr import Lengths, fixed_layers, path_rules
from lag_megatron.config.schema.run import GrowthConfig, RunConfig, StageConfig


def path_problems(config: RunConfig) -> Iterator[str]:
    """Mistakes in ``raptr`` and in the paths of stages and of their candidates."""
    yield from _unused(config)
    for number, stage in enumerate(config.stages):
        where, layers = f"stages.{number}", config.layers_of(number)
        if layers < 1 or stage.steps < 1:
            continue  # reported elsewhere
        if stage.path_length is not None and stage.keep_probability is not None:
            yield f"{where}: give either path_length or keep_probability."
        if stage.path_length is not None:
            yield from _lengths(config, stage, stage.path_length, layers, f"{where}.path_length")
        yield from _probabilities(config, stage, where)
        if config.has_event(number):
            yield from _candidates(config, number)
        if config.takes_paths(number):
            yield from _fixed(config, number)


def _fixed(config: RunConfig, number: int) -> Iterator[str]:
    layers, fixed = config.layers_of(number), config.raptr.fixed
    wrong = [layer for layer in fixed if not -layers <= layer < layers]
    if wrong:
        yield (
            f"raptr.fixed: {wrong} are no layers of stage {number}, which has {layers}. They are "
            f"numbered from 0 to {layers - 1}, or from -1 down from the top."
        )


def _lengths(
    config: RunConfig, stage: StageConfig, value: object, layers: int, where: str
) -> Iterator[str]:
    lengths = value if isinstance(value, tuple) else (value,)
    least = max(1, len(fixed_layers(config.raptr.fixed, layers)))
    if any(not least <= length <= layers for length in lengths):
        yield (
            f"{where}: must lie between {least}, the layers of raptr.fixed, and the stage's "
            f"{layers} (got {list(lengths)})."
        )
    yield from _parts(stage, lengths, where)


def _probabilities(config: RunConfig, stage: StageConfig, where: str) -> Iterator[str]:
    value = stage.keep_probability
    if value is None:
        return
    values = value if isinstance(value, tuple) else (value,)
    if any(not 0 < probability <= 1 for probability in values):
        yield f"{where}.keep_probability: must be above 0 and at most 1 (got {list(values)})."
    if not config.raptr.fixed:
        yield (
            f"{where}.keep_probability: without a layer in raptr.fixed a step could have none at "
            "all. Fix one, or give path_length."
        )
    yield from _parts(stage, values, f"{where}.keep_probability")


def _parts(stage: StageConfig, values: tuple[object, ...], where: str) -> Iterator[str]:
    if not 0 < len(values) <= max(stage.steps, 1):
        yield (
            f"{where}: one value, or several for parts of the stage's {stage.steps} steps "
            f"(got {len(values)})."
        )
    if len(values) > 1 and stage.until_slope is not None:
        yield (
            f"{where}: equal parts of a stage need its length, which until_slope leaves open. Give "
            "one value, or remove until_slope."
        )


def _candidates(config: RunConfig, number: int) -> Iterator[str]:
    """Paths that a pool tries before a stage."""
    stage, growth = config.stages[number], config.growth_before(number)
    where = f"stages.{number}.growth.pool" if stage.growth else "growth.pool"
    pool = growth.pool
    if pool.operator == "identity" and config.grows(number):
        yield (
            f"{where}.operator: 'identity' adds no layers, but stage {number} has more than the "
            "one before. Take an operator that grows."
        )
    if pool.operator == "identity" and not pool.path_length:
        yield (
            f"{where}.path_length: with the operator 'identity' candidates differ in their paths "
            "alone, so one or more are needed, e.g. [6, [8, 12]]."
        )
    yield from _alike(config, number, f"{where}.path_length")
    for value in pool.path_length:
        layers = config.layers_of(number)
        yield from _lengths(config, stage, value, layers, f"{where}.path_length")
    if pool.path_length and (stage.path_length or stage.keep_probability):
        yield (
            f"stages.{number}: its candidates' paths ({where}.path_length) are the stage's. Remove "
            "its own path_length or keep_probability."
        )


def _alike(config: RunConfig, number: int, where: str) -> Iterator[str]:
    """Candidates whose paths are the same up to the decision, which could not compare them."""
    stage, growth = config.stages[number], config.growth_before(number)
    if growth.lag == "auto" and not growth.rungs:
        return  # reported elsewhere
    end = stage.steps if growth.exhaustive else min(growth.last_rung, stage.steps)
    seen: dict[object, Lengths] = {}
    for value in growth.pool.path_length:
        if not value or min(value if isinstance(value, tuple) else (value,)) < 1:
            continue  # reported elsewhere
        before_decision = tuple(
            (part.start, min(part.stop, end), rule)
            for part, rule in path_rules(stage.steps, value, None)
            if part.start < max(end, 1)
        )
        if before_decision in seen:
            yield (
                f"{where}: {_as_text(seen[before_decision])} and {_as_text(value)} are the same "
                f"for the {end} steps before the decision. Remove one, or decide later."
            )
        seen.setdefault(before_decision, value)


def _as_text(value: Lengths) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def _unused(config: RunConfig) -> Iterator[str]:
    """Paths for candidates of growth events that do not exist."""
    stages = range(1, len(config.stages))
    for number in stages:
        growth = config.stages[number].growth
        if growth is not None and growth.pool.path_length and not config.has_event(number):
            yield _no_event(f"stages.{number}.growth", growth)
    tried = [n for n in stages if config.has_event(n) and config.stages[n].growth is None]
    if config.growth.pool.path_length and not tried:
        yield _no_event("growth", config.growth)


def _no_event(where: str, growth: GrowthConfig) -> str:
    return (
        f"{where}.pool.path_length: no stage of this run tries these paths, because none grows "
        f"by {growth.pool.operator!r}. With stages of one size take operator: identity."
    )
