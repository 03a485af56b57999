"""YAML with ``extends:`` and ``--set`` overrides, checked as a whole.

All mistakes are reported at once, each with its dotted path, its value, what is allowed and, for
an unknown key, the nearest known one.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from lag_megatron.config.schema.base import Tree
from lag_megatron.config.schema.param_names import read_names_tree
from lag_megatron.config.schema.run import GrowthConfig, RunConfig
from lag_megatron.config.schema.stage_schedule import in_steps
from lag_megatron.config.stage_policy import expand_stages
from lag_megatron.config.validation.messages import describe_errors, truth_value_problems
from lag_megatron.config.validation.ranges import growth_range_problems
from lag_megatron.config.validation.run import find_problems, growth_problems
from lag_megatron.config.validation.stages import length_problems
from lag_megatron.config.validation.values import value_problems
from lag_megatron.errors import ConfigError
from lag_megatron.small_files import describe_kind, parse_yaml, read_yaml


def load_config(path: str | Path, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file.

    Args:
        path: YAML file; ``extends: other.yaml`` (relative to it) is read first.
        overrides: ``a.b=c`` strings; ``c`` is YAML, list items are addressed as ``stages.0.steps``.

    A path under ``growth.names`` is relative to the file that gives it.

    Raises:
        ConfigError: with every problem found.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    _read_names_files(tree, Path(path).parent)
    return parse_config(tree, source=str(path))


def parse_config(tree: Tree, *, source: str = "configuration") -> RunConfig:
    """Check a plain mapping and turn it into a :class:`RunConfig`."""
    if lines := list(value_problems(tree)):
        raise ConfigError(_block(source, lines))
    tree, wrong = expand_stages(tree)
    tree = _merge_stage_growth(tree)
    if wrong:  # the rest is checked without stages, so that all mistakes are reported together
        tree = {**tree, "stages": [{"steps": 1}]}
    try:
        config = _run_adapter().validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_block(source, [*wrong, *describe_errors(error, tree)])) from None
    if wrong := [*wrong, *truth_value_problems(tree)]:
        raise ConfigError(_block(source, wrong))
    lines = list(length_problems(config))
    config = in_steps(config)
    if lines := [*lines, *find_problems(config)]:
        raise ConfigError(_block(source, lines))
    return config


@cache
def _run_adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)  # takes tens of milliseconds to make


def parse_growth(tree: Tree, *, source: str) -> GrowthConfig:
    """Check the settings of one growth event on their own, outside of a configuration.

    Its stage is taken to be as long as the lag, or the last rung, asks for.

    Raises:
        ConfigError: with every problem found.
    """
    if lines := list(value_problems(tree)):
        raise ConfigError(_block(source, lines))
    try:
        growth = TypeAdapter(GrowthConfig).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(
            _block(source, describe_errors(error, tree, schema=GrowthConfig))
        ) from None
    lines = truth_value_problems(tree, schema=GrowthConfig)
    lines = lines or list(growth_range_problems(growth, ""))
    lines = lines or list(growth_problems(growth, "", steps=_longest(growth)))
    if lines:
        raise ConfigError(_block(source, [line.removeprefix(".") for line in lines]))
    return growth


def _longest(growth: GrowthConfig) -> int:
    steps = (*growth.rungs, *(() if growth.lag == "auto" else (growth.lag,)))
    return max(steps, default=0)


def dump_config(config: RunConfig) -> str:
    """The complete configuration as YAML that :func:`load_config` reads back unchanged."""
    tree = _run_adapter().dump_python(config, mode="json")
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)


def read_tree(path: Path, *, seen: tuple[Path, ...] = ()) -> Tree:
    """One YAML file with everything it extends merged under it."""
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be used as a path: {error}.") from None
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(f"{path}: extends itself ({chain}). Remove one `extends:`.")
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" Files there: {', '.join(near)}." if near else ""
        raise ConfigError(f"{path}: no such configuration file.{hint}")
    tree = read_yaml(path, what="a configuration as YAML", error=ConfigError)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {describe_kind(tree)}.")
    _read_names_files(tree, path.parent)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: must be the path of a YAML file (got {base!r}).")
    return merge(read_tree(path.parent / base, seen=(*seen, path)), tree)


def _read_names_files(tree: Tree, folder: Path) -> None:
    """Put what is in a names file where its path, relative to ``folder``, is given."""
    stages = tree.get("stages")
    parts = [tree, *(stages if isinstance(stages, list) else ())]
    for growth in (part.get("growth") for part in parts if isinstance(part, dict)):
        if isinstance(growth, dict) and isinstance(growth.get("names"), str):
            growth["names"] = read_names_tree(folder / growth["names"])


def merge(base: Tree, over: Mapping[str, Any]) -> Tree:
    """``over`` on top of ``base``: mappings are merged, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def apply_override(tree: Tree, override: str) -> None:
    """Set one dotted path of ``tree`` in place from ``path=value``."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(
            f"--set {override}: expected key.path=value, e.g. --set optimizer.lr=3e-4"
        )
    value = parse_yaml(text, where=f"--set {override}", what="a value as YAML", error=ConfigError)
    *parents, last = re.sub(r"\[(\d+)\]", r".\1", path).split(".")
    node: Any = tree
    for key in parents:
        node = _child(node, key, override)
    _assign(node, last, value, override)


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, key, override)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: {key!r} lies inside a value that is not a mapping.")
    child = node.setdefault(key, {})
    if child is None:
        child = node[key] = {}
    return child


def _assign(node: Any, key: str, value: Any, override: str) -> None:
    if isinstance(node, list):
        node[_list_index(node, key, override)] = value
    elif isinstance(node, dict):
        node[key] = value
    else:
        raise ConfigError(f"--set {override}: {key!r} lies inside a value that is not a mapping.")


def _list_index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"--set {override}: {key!r} is not an index below {len(node)}.")
    return int(key)


def _merge_stage_growth(tree: Tree) -> Tree:
    """Lay each stage's ``growth`` over the global one, so that a stage names only differences."""
    stages, growth = tree.get("stages"), tree.get("growth", {})
    if not isinstance(stages, list) or not isinstance(growth, dict):
        return tree
    merged = [
        {**stage, "growth": merge(growth, stage["growth"])}
        if isinstance(stage, dict) and isinstance(stage.get("growth"), dict)
        else stage
        for stage in stages
    ]
    return {**tree, "stages": merged}


def _block(source: str, lines: Sequence[str]) -> str:
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return f"{count} in {source}\n" + "\n".join(f"  {line}" for line in lines)
