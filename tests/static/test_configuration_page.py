"""docs/configuration.md has every key of the schema, and ranges that the validation enforces."""

import copy
import functools
import re

import pytest
from conftest import ROOT

from lag_megatron.config.load import parse_config, read_tree
from lag_megatron.errors import ConfigError
from tools.docs import configuration

KEYS = [key for section in configuration.sections() for key in section.keys]
POLICY = {"policy": "raptr", "layers": [4], "steps": 100, "flops_share": 0.8, "path_stages": 2}
HALVING = {"rule": "halving", "lag": 20, "rungs": []}


def test_the_tables_are_generated_from_the_schema():
    _, found, rest = configuration.PAGE.read_text(encoding="utf-8").partition(configuration.BEGIN)
    assert found
    assert rest.partition(configuration.END)[0].strip() == configuration.tables(), (
        "run python tools/docs/configuration.py --write"
    )


def test_keys_have_a_sentence_and_stand_once():
    paths = [key.path for key in KEYS]
    assert len(set(paths)) == len(paths)
    assert {"growth.pool.operator", "data.mixture.N.weight", "stages.flops_share"} <= set(paths)
    assert [key.path for key in KEYS if not key.meaning.endswith(".")] == []


def outside(allowed):
    """Values that a range excludes."""
    if above := re.fullmatch(r"above (-?\d+)", allowed):
        return [int(above[1])]
    if least := re.fullmatch(r"(\d+) or more", allowed):
        return [int(least[1]) - 1]
    left, low, high, right = re.fullmatch(r"in ([\[(])(-?\d+), (-?\d+)([\])])", allowed).groups()
    return [int(low) - (0.5 if left == "[" else 0), int(high) + (0.5 if right == "]" else 0)]


@functools.cache
def trees():
    """Configurations in which a key may stand: the ones that come with the product, and more."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        tree = read_tree(path)
        halving = {**tree.get("growth", {}), **HALVING}
        found += [tree, {**tree, "growth": halving}]
    demo = read_tree(ROOT / "configs" / "demo.yaml")
    demo.pop("growth")
    return [*found, {**demo, "stages": POLICY}]


def set_value(tree, path, value):
    """A copy of ``tree`` with one key set; None where a part of the path is missing."""
    tree = copy.deepcopy(tree)
    *parents, last = path.split(".")
    node = tree
    for part in parents:
        if isinstance(node, list):
            node = node[int(part)] if int(part) < len(node) else None
        elif isinstance(node, dict) and not part.isdigit():
            node = node.setdefault(part, {})
        else:
            return None
    if not isinstance(node, dict):
        return None
    node[last] = value
    return tree


def refused(tree, path):
    try:
        parse_config(tree)
    except ConfigError as error:
        return re.search(rf"^\W*{re.escape(path)}\b", str(error), re.MULTILINE) is not None
    return False


@pytest.mark.parametrize("key", [key for key in KEYS if key.range], ids=lambda key: key.path)
def test_values_outside_the_range_are_refused(key):
    number = "1" if key.path.startswith("stages") else "0"
    path = key.path.replace(".N.", f".{number}.")
    for value in outside(key.range):
        if key.type.startswith("integer"):
            value = int(value)
        values = [value, 0.9] if key.type.startswith("list of 2") else value
        values = [value] if key.type == "list of number" else values
        for tree in trees():
            changed = set_value(tree, path, values)
            if changed is not None and refused(changed, path):
                break
        else:
            pytest.fail(f"{path}: {value} is nowhere refused")
