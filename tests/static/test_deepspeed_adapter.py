"""DeepSpeed's private attributes: checked against the installed version, and used in one place."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lag_megatron.engine.deepspeed_adapter import ADAPTERS, adapt
from lag_megatron.engine.deepspeed_adapter.base import KNOWN_VERSIONS
from lag_megatron.errors import DeepSpeedVersionError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lag_megatron"
ADAPTER = PACKAGE / "engine" / "deepspeed_adapter"
# DeepSpeed documents this one: ``deepspeed.initialize`` returns it.
DOCUMENTED = {"optimizer"}
BY_NAME = ("getattr", "setattr", "hasattr", "delattr")
# What DeepSpeed's objects are called in the adapter.
OBJECTS = ("zero", "coordinator", "self._engine", "self._optimizer")
CASES = [
    (kind, path) for kind in ADAPTERS for path in (*kind.required, *kind.required_of_parameters)
]


def names_of(kind):
    paths = (*kind.required, *kind.required_of_parameters)
    return {name.removesuffix("()") for path in paths for name in path.split(".")}


NAMES = set().union(*(names_of(kind) for kind in ADAPTERS))
# torch's tensors and optimizers have ``device``, ``param_groups`` and the like too.
TENSOR = torch.zeros(1, requires_grad=True)
OF_TORCH = {*dir(TENSOR), *dir(torch.optim.AdamW([TENSOR]))}
PRIVATE = NAMES - OF_TORCH - DOCUMENTED


def engine_with(kind, *, without=None):
    """A stand-in for DeepSpeed's engine with everything that an adapter needs, or all but one."""
    parameter, engine = SimpleNamespace(), SimpleNamespace(optimizer=SimpleNamespace())
    engine.module = SimpleNamespace(parameters=lambda: [parameter])
    for name in kind.required_of_parameters:
        if name != without:
            setattr(parameter, name, (1,))
    for path in kind.required:
        if path == without:
            continue
        at, (*parents, last) = engine, path.split(".")
        for parent in parents:
            at = child_of(at, parent)
        if not hasattr(at, last):
            setattr(at, last, SimpleNamespace())
    return engine


def child_of(at, name):
    """An attribute, or what a method without arguments returns; made if it is not there."""
    plain = name.removesuffix("()")
    if not hasattr(at, plain):
        made = SimpleNamespace()
        setattr(at, plain, made if plain == name else lambda: made)
    found = getattr(at, plain)
    return found if plain == name else found()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_engine_with_all_attributes_is_taken(kind):
    kind(engine_with(kind))


@pytest.mark.parametrize(("kind", "path"), CASES)
def test_a_missing_attribute_is_named_with_the_versions_that_have_it(kind, path, monkeypatch):
    monkeypatch.setattr("lag_megatron.engine.deepspeed_adapter.base.version", lambda name: "9.9.9")
    if any(other.startswith(f"{path}.") for other in kind.required):
        pytest.fail(f"{path} is checked with what lies below it")
    with pytest.raises(DeepSpeedVersionError) as caught:
        kind(engine_with(kind, without=path))
    message = str(caught.value)
    assert re.search(rf"has no (parameter\.)?{re.escape(path)}\. ", message)
    assert message.startswith(f"DeepSpeed 9.9.9 under {kind.stage} (optimizer SimpleNamespace)")
    assert KNOWN_VERSIONS in message


def test_all_that_is_missing_is_named_at_once():
    engine = SimpleNamespace(optimizer=SimpleNamespace())
    with pytest.raises(DeepSpeedVersionError, match=r"global_steps, .*optimizer\.fp32_groups"):
        adapt(engine, zero_stage=0, precision="bf16")


@pytest.mark.parametrize(
    ("zero_stage", "precision", "name"),
    [
        (0, "fp32", "PlainAdapter"),
        (0, "bf16", "MixedAdapter"),
        (1, "bf16", "Zero12Adapter"),
        (2, "fp32", "Zero12Adapter"),
        (3, "bf16", "Zero3Adapter"),
    ],
)
def test_each_stage_has_its_adapter(zero_stage, precision, name):
    (kind,) = (kind for kind in ADAPTERS if kind.__name__ == name)
    assert type(adapt(engine_with(kind), zero_stage=zero_stage, precision=precision)) is kind


def test_the_known_versions_are_those_that_are_installed():
    assert f'"deepspeed{KNOWN_VERSIONS}"' in (ROOT / "setup.py").read_text()


def attributes_in(path):
    """Names that a file reads or writes as attributes, also by getattr and its like."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def of_deepspeeds_objects(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in OBJECTS:
            yield node.attr


@pytest.mark.parametrize("path", sorted(ADAPTER.glob("*.py")), ids=lambda path: path.name)
def test_what_the_adapter_uses_is_checked(path):
    assert set(of_deepspeeds_objects(path)) <= NAMES | {"module"}


def test_what_is_checked_is_used():
    used = {name for path in ADAPTER.glob("*.py") for name in attributes_in(path)}
    counters = {"global_steps", "global_samples", "skipped_steps"}  # used by a loop over them
    assert NAMES - used <= counters


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != ADAPTER],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_other_module_uses_them(path):
    assert not PRIVATE.intersection(attributes_in(path))
