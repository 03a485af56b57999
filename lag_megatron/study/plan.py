"""From a study file to its runs: resolved configurations whose planned costs are equal."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lag_megatron.config import RunConfig, check_probe_groups, parse_config
from lag_megatron.config.load import merge
from lag_megatron.config.schema.base import Tree
from lag_megatron.config.validation.run import find_problems
from lag_megatron.errors import ConfigError, PlanError
from lag_megatron.study.budget import PlannedCost, RunCostModel, with_last_steps
from lag_megatron.study.schema import Study, study_error

_ENDLESS = ("constant", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        config: resolved and complete, with the steps that the budget allows.
        cost: planned, in floating-point operations.
    """

    arm: str
    learning_rate: str
    seed: int
    config: RunConfig
    cost: PlannedCost

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.arm}-{self.learning_rate}-s{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """All runs of a study: seeds first, then learning rates, then arms, as the file orders them.

    Attributes:
        budget: floating-point operations that no run's planned cost exceeds.
        vocab_size: rows of the embedding, which costs depend on.
        vocab_origin: where that number comes from.
    """

    study: Study
    budget: int
    vocab_size: int
    vocab_origin: str
    runs: tuple[PlannedRun, ...]


def plan_study(study: Study) -> StudyPlan:
    """Resolve every run and set the steps of its last stage to what the budget allows.

    Raises:
        ConfigError: with every problem of every arm: settings that do not hold, arms that cannot
            be compared, and arms whose earlier stages and searches alone exceed the budget.
    """
    settings = study.config
    configs = _configs(study)
    if lines := list(_incomparable(study, configs)):
        raise study_error(study.path, lines)
    prices = _prices(study, configs)
    budget = _budget(study, configs, prices)
    fitted, lines = {}, []
    for (arm, rate), config in configs.items():
        steps = prices[arm].steps_within(budget)
        fitted[arm, rate] = with_last_steps(config, steps)
        lines += _too_short(fitted[arm, rate], arm, budget, prices[arm], steps)
    if lines:
        raise study_error(study.path, list(dict.fromkeys(lines)))
    return StudyPlan(
        study=study,
        budget=budget,
        vocab_size=prices[settings.reference].vocab_size,
        vocab_origin=prices[settings.reference].vocab_origin,
        runs=tuple(
            PlannedRun(
                arm=arm,
                learning_rate=rate,
                seed=seed,
                config=replace(config, seed=seed, data=replace(config.data, seed=seed)),
                cost=prices[arm].of(config.stages[-1].steps),
            )
            for seed in settings.seeds
            for rate in settings.learning_rates
            for arm in settings.arms
            for config in [fitted[arm, rate]]
        ),
    )


def _configs(study: Study) -> dict[tuple[str, str], RunConfig]:
    """The configuration of each arm and learning rate, before the budget is shared out."""
    found, problems = {}, []
    base = _quiet(study.base)
    for arm, over in study.config.arms.items():
        for rate, optimizer in study.config.learning_rates.items():
            tree = merge(merge(base, over), optimizer)
            try:
                found[arm, rate] = parse_config(tree, source="")
            except ConfigError as error:
                texts = [line.strip() for line in str(error).splitlines()[1:]]
                problems += [(arm, rate, text) for text in texts]
    if problems:
        raise study_error(study.path, list(_where_each(problems)))
    return found


def _where_each(problems: list[tuple[str, str, str]]) -> Iterator[str]:
    """Each problem once, with the arms and learning rates that have it."""
    for text in dict.fromkeys(text for *_, text in problems):
        places = [f"{arm}-{rate}" for arm, rate, other in problems if other == text]
        yield f"{', '.join(places)}: {text}"


def _quiet(base: Tree) -> Tree:
    """The base with W&B off, unless it says something of it itself."""
    tracking = base.get("tracking") or {}
    wandb = tracking.get("wandb") if isinstance(tracking, Mapping) else None
    if isinstance(wandb, Mapping) and "mode" in wandb:
        return base
    return merge(base, {"tracking": {"wandb": {"mode": "disabled"}}})


def _incomparable(study: Study, configs: Mapping[tuple[str, str], RunConfig]) -> Iterator[str]:
    settings = study.config
    for (arm, rate), config in configs.items():
        other = configs[settings.reference, rate]
        for key, ours, theirs in (
            ("data", replace(config.data, seed=0), replace(other.data, seed=0)),
            ("model.seq_length", config.model.seq_length, other.model.seq_length),
            ("model.vocab_size", config.model.vocab_size, other.model.vocab_size),
        ):
            if ours != theirs:
                yield (
                    f"arms.{arm}: {key} differs from that of the reference {settings.reference}, "
                    "so that their losses cannot be compared. Set it in the base."
                )
        yield from _unplannable(config, f"{arm}-{rate}")
        if not settings.launcher:
            try:
                check_probe_groups(config, world_size=1)
            except ConfigError as error:
                yield f"{arm}-{rate}: without a launcher there is one rank. {error}"


def _unplannable(config: RunConfig, name: str) -> Iterator[str]:
    """Settings with which a run's cost or its schedule does not follow from its budget."""
    schedule = config.optimizer.schedule
    if schedule.name not in _ENDLESS and schedule.decay_steps is not None:
        yield (
            f"{name}: optimizer.schedule.decay_steps: must be null, so that each run's decay ends "
            f"where the run does (got {schedule.decay_steps})."
        )
    for stage, growth in enumerate(config.stages):
        if growth.until_slope is not None:
            yield (
                f"{name}: stages.{stage}.until_slope: the run's cost is not known beforehand, so "
                "its budget cannot be set. Give the stage its steps alone."
            )
        if config.has_event(stage) and config.growth_before(stage).pool.path_length:
            yield (
                f"{name}: stages.{stage}: candidates with paths of their own leave the stage's "
                "cost open, so its budget cannot be set. Give the stage its path_length."
            )
        if config.has_event(stage) and config.growth_before(stage).exhaustive:
            yield (
                f"{name}: stages.{stage}: growth.exhaustive trains every candidate to the end, "
                "which is research on rules, not a policy. Set it to false."
            )


def _prices(study: Study, configs: Mapping[tuple[str, str], RunConfig]) -> dict[str, RunCostModel]:
    """Of each arm; learning rates do not change what a run costs."""
    prices, lines = {}, []
    rate = next(iter(study.config.learning_rates))
    for arm in study.config.arms:
        try:
            prices[arm] = RunCostModel(configs[arm, rate])
        except PlanError as error:
            lines.append(f"arms.{arm}: {error}")
    if lines:
        raise study_error(study.path, lines)
    return prices


def _budget(
    study: Study, configs: Mapping[tuple[str, str], RunConfig], prices: Mapping[str, RunCostModel]
) -> int:
    budget = study.config.budget
    if budget.of is None:
        assert budget.flops is not None  # the file was checked
        return int(budget.flops)
    config: Any = next(config for (arm, _), config in configs.items() if arm == budget.of)
    return prices[budget.of].of(config.stages[-1].steps).total


def _too_short(
    config: RunConfig, arm: str, budget: int, price: RunCostModel, steps: int
) -> Iterator[str]:
    """What the budget makes impossible: no last stage, or one shorter than its settings need."""
    if steps == 0:
        yield (
            f"arms.{arm}: one step of the last stage, the earlier stages and the searches cost "
            f"{price.of(1).total:.4e} FLOPs, but the budget is {budget:.4e}. Shorten the earlier "
            "stages, search less, or raise the budget."
        )
        return
    for line in find_problems(config):
        yield f"arms.{arm}, with the {steps:,} steps that the budget leaves its last stage: {line}"
