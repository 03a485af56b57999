"""Whether a YAML block of the documents is a configuration, or parts of one."""

import re

import yaml
from pydantic import TypeAdapter, ValidationError

from lag_megatron.config.load import parse_config
from lag_megatron.config.schema.param_names import parse_param_names
from lag_megatron.config.schema.run import RunConfig
from lag_megatron.config.stage_policy import StackingConfig
from lag_megatron.errors import LagError
from lag_megatron.study.schema import StudyConfig

_NAMES = {"roles", "layers"}


def config_problems(text: str) -> list[str]:
    """What is wrong with a block: a names file, a study, a configuration, or some keys of one.

    A key that is given more than once is there to show its forms: each is looked at.
    """
    entries = [
        yaml.safe_load(part) for part in re.split(r"^(?=\w)", text, flags=re.M) if part.strip()
    ]
    entries = [entry for entry in entries if entry is not None]
    if not all(isinstance(entry, dict) for entry in entries):
        return ["not a mapping"]
    keys = [key for entry in entries for key in entry]
    tree = {key: value for entry in entries for key, value in entry.items()}
    try:
        if set(keys) <= _NAMES:
            parse_param_names(tree, where="names")
            return []
        if {"model", "stages"} <= set(keys) and len(keys) == len(set(keys)):
            parse_config(tree)
            return []
    except LagError as error:
        return [str(error)]
    schema = StudyConfig if "arms" in keys else RunConfig
    return [line for entry in entries for line in _wrong_parts(entry, schema)]


def _wrong_parts(tree: dict[str, object], schema: type) -> list[str]:
    """Keys and values that the schema does not have; whatever is missing stands elsewhere."""
    tree = dict(tree)
    lines = []
    tree.pop("extends", None)
    if schema is RunConfig and isinstance(tree.get("stages"), dict):
        lines += _errors(tree.pop("stages"), StackingConfig)
    growth = tree.get("growth")
    if isinstance(growth, dict) and isinstance(growth.get("names"), str):  # the path of a file
        tree["growth"] = {key: value for key, value in growth.items() if key != "names"}
    return [*lines, *_errors(tree, schema)]


def _errors(tree: object, schema: type) -> list[str]:
    try:
        TypeAdapter(schema).validate_python(tree)
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors()
            if problem["type"] not in ("missing", "missing_argument")
        ]
    return []
