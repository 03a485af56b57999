"""The study file: which arms are compared, over which seeds, at what budget."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lag_megatron.config.load import read_tree
from lag_megatron.config.schema.base import FORBID, Tree
from lag_megatron.config.validation.messages import describe_errors, truth_value_problems
from lag_megatron.config.validation.values import value_problems
from lag_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """Floating-point operations of every run, search included: a number, or what an arm costs."""

    __pydantic_config__ = FORBID
    of: str | None = None
    flops: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Growth policies (arms) compared at equal FLOPs.

    Attributes:
        base: configuration that all runs share, relative to the study file.
        seeds: of weights, growth and text; a run for each, arm and learning rate.
        launcher: words before ``launch/train.py``; empty is this Python, on one rank.  ``{port}``
            becomes a free port and ``{slot}`` the number, from 0, of the worker.
        budget: what every run may cost.
        reference: the arm that the others are compared with.
        arms: name to a tree merged over the base.
        learning_rates: name to a tree, of ``optimizer`` alone, merged over base and arm.
    """

    __pydantic_config__ = FORBID
    base: str
    budget: BudgetConfig
    reference: str
    arms: dict[str, Any]
    seeds: tuple[int, ...] = (1, 2, 3)
    launcher: tuple[str, ...] = ()
    learning_rates: dict[str, Any] = field(default_factory=lambda: {"base": {}})


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A study file that has been read, with the tree of its base."""

    name: str
    path: Path
    config: StudyConfig
    base: Tree


def load_study(path: Path) -> Study:
    """Read a study file and its base.

    Raises:
        ConfigError: with every problem found.
    """
    tree = read_tree(path)
    if lines := list(value_problems(tree)):
        raise study_error(path, lines)
    try:
        config = TypeAdapter(StudyConfig).validate_python(tree)
    except ValidationError as error:
        raise study_error(path, describe_errors(error, tree, schema=StudyConfig)) from None
    if lines := [*truth_value_problems(tree, schema=StudyConfig), *_problems(config)]:
        raise study_error(path, lines)
    base = read_tree(path.resolve().parent / config.base)
    return Study(name=path.stem, path=path, config=config, base=base)


def study_error(source: Path, lines: list[str]) -> ConfigError:
    """One error for all problems of a file."""
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return ConfigError(f"{count} in {source}\n" + "\n".join(f"  {line}" for line in lines))


def _problems(config: StudyConfig) -> Iterator[str]:
    if not config.seeds:
        yield "seeds: at least one is needed, and three or more for intervals."
    if len(set(config.seeds)) < len(config.seeds) or min(config.seeds, default=0) < 0:
        yield f"seeds: must differ and not be negative (got {list(config.seeds)})."
    yield from _trees(config.arms, "arms")
    yield from _trees(config.learning_rates, "learning_rates")
    for name, tree in config.arms.items():
        if isinstance(tree, Mapping) and _sets_seed(tree):
            yield f"arms.{name}: runs take the study's seeds. Remove seed and data.seed from it."
    for name, tree in config.learning_rates.items():
        others = sorted(set(tree) - {"optimizer"}) if isinstance(tree, Mapping) else []
        if others:
            yield (
                f"learning_rates.{name}: holds settings of optimizer alone, so that it does not "
                f"change what a run costs (got {', '.join(others)}). Move the others to an arm."
            )
    arms = ", ".join(config.arms)
    if config.reference not in config.arms:
        yield f"reference: must be one of the arms {arms} (got {config.reference!r})."
    yield from _budget(config.budget, config.arms)


def _trees(trees: Mapping[str, Any], where: str) -> Iterator[str]:
    if not trees:
        yield f"{where}: at least one is needed."
    for name, tree in trees.items():
        # Names are joined by dashes into names of run directories.
        if not re.fullmatch(r"\w+", name, re.ASCII):
            yield f"{where}.{name}: a name has letters, digits and _ alone (got {name!r})."
        if not isinstance(tree, Mapping):
            yield f"{where}.{name}: must be a mapping (got {tree!r}). Write {{}} to change nothing."


def _sets_seed(tree: Mapping[str, Any]) -> bool:
    data = tree.get("data")
    return "seed" in tree or (isinstance(data, Mapping) and "seed" in data)


def _budget(budget: BudgetConfig, arms: Mapping[str, Any]) -> Iterator[str]:
    if (budget.of is None) == (budget.flops is None):
        yield "budget: give either of: ARM or flops: NUMBER."
    if budget.of is not None and budget.of not in arms:
        yield f"budget.of: must be one of the arms {', '.join(arms)} (got {budget.of!r})."
    if budget.flops is not None and not 0 < budget.flops < math.inf:
        yield f"budget.flops: must be above 0 and finite (got {budget.flops})."
