"""Every number of a configuration is finite and within its range, or refused with its path."""

import copy
import dataclasses
import typing
from itertools import pairwise

import pytest
from configuring import BASE, config, problems

from lag_megatron.config import GrowthConfig, RunConfig, parse_config, parse_growth
from lag_megatron.config.schema.ranges import require_positive, require_whole
from lag_megatron.errors import ConfigError, PlanError

# Values that no key of the schema takes, or none as a number.
WRONG = [float("nan"), float("inf"), -float("inf"), "nan", 10**400, {"a": 1}, [[[1]]], "\0"]


def keys(schema, prefix=()):
    """The dotted path of every key that is no mapping itself, and its type."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind, path = hints[field.name], (*prefix, field.name)
        inner = next(
            (t for t in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(t)), None
        )
        if inner is None:
            yield path, kind
        elif typing.get_origin(kind) is tuple:
            yield from keys(inner, (*path, "0"))
        else:
            yield from keys(inner, path)


def with_value(path, value):
    """A configuration with one value replaced, under parents that are made for it."""
    tree = node = copy.deepcopy(BASE)
    for key, following in pairwise(path):
        new = [{"name": "a", "weight": 1.0, "paths": ["b"]}] if following == "0" else {}
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, new)
    node[path[-1]] = value
    return tree


KEYS = dict(keys(RunConfig))
NUMBERS = {path for path, kind in KEYS.items() if {int, float} & {kind, *typing.get_args(kind)}}
TEXTS = {path for path, kind in KEYS.items() if {str} & {kind, *typing.get_args(kind)}}


def test_the_schema_has_the_keys_that_are_tried():
    assert len(NUMBERS) > 50
    assert {("growth", "max_loss"), ("model", "init_std"), ("stages", "0", "rewind")} <= NUMBERS


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_a_wrong_value_of_any_key_is_refused_in_our_words(path):
    name = ".".join(path)
    for value in WRONG:
        if path in TEXTS and value == "nan":
            continue
        if path[-1] in ("deepspeed", "names", "options") and isinstance(value, dict):
            continue
        with pytest.raises(ConfigError, match="problem") as caught:
            parse_config(with_value(path, value))
        text = str(caught.value)
        assert name in text, (value, text)
        assert "Input should" not in text
        assert "\0" not in text


@pytest.mark.parametrize("path", sorted(NUMBERS), ids=".".join)
def test_true_is_no_number(path):
    with pytest.raises(ConfigError, match=rf"{'.'.join(path)}: must be .*\(got [Tt]rue\)"):
        parse_config(with_value(path, True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("growth.max_loss=.nan", "growth.max_loss: must be a finite number (got nan)."),
        ("growth.max_loss=nan", "growth.max_loss: must be a finite number (got 'nan')."),
        ("growth.max_loss=0", "growth.max_loss: must be above 0 nats (got 0.0)."),
        ("growth.pool.index=-1", "growth.pool.index: must be 0 or more (got -1)."),
        ("growth.pool.block_size=[1, 0]", "growth.pool.block_size: must be 1 or more (got 0)."),
        ("seed=-1", "seed: must be 0 or more (got -1)."),
        ("data.seed=-1", "data.seed: must be 0 or more (got -1)."),
        ("model.vocab_size=0", "model.vocab_size: must be 1 or more (got 0)."),
        ("stages.1.num_layers=20000", "stages.1.num_layers: must be at most 10,000 (got 20,000)."),
        (
            "parallel.timeout=1e300",
            "parallel.timeout: must be above 0 and at most 100,000,000 seconds (got 1e+300).",
        ),
        (
            f"seed={2**70}",
            "seed: must lie within 64 bits (got a number of 71 bits).",
        ),
        ("deepspeed={a: {b: .inf}}", "deepspeed.a.b: must be a finite number (got inf)."),
        (
            'data.text_key="a\\0b"',
            "data.text_key: no name or path has such characters (got 'a\\x00b'). Remove them.",
        ),
        ("growth.pool.options={1: 2}", "growth.pool.options.1: a key must be text (got 1). Put it "
         "in quotes."),
    ],
)  # fmt: skip
def test_numbers_out_of_range(override, message):
    assert message in problems(override)


def test_the_growth_is_checked_where_nothing_grows():
    assert problems("stages=[{steps: 1}]", "growth.eta=1") == [
        "growth.eta: must be 2 or more (got 1)."
    ]


def test_a_mistake_that_stages_inherit_is_said_once():
    lines = problems("growth.eta=1", "stages.1.growth={max_loss: 5}")
    assert lines == ["growth.eta: must be 2 or more (got 1)."]
    lines = problems("stages.1.growth={eta: 1}")
    assert lines == ["stages.1.growth.eta: must be 2 or more (got 1)."]


@pytest.mark.parametrize("stages", ["3", "null", "text", "[3]", "[null]", "{}", "[[]]", "{3: 3}"])
def test_stages_of_another_type_are_refused_in_our_words(stages):
    assert not [line for line in problems(f"stages={stages}") if "Input should" in line]


@pytest.mark.parametrize(
    "short",
    [
        *("layers: [100000000000]", "alpha: .nan", "alpha: 1e300", "alpha: -1", "alpha: true"),
        *("steps: -1", "steps: true", "layers: [0, 1]", "layers: []", "tokens: []"),
    ],
)
def test_numbers_of_the_short_form_of_stages(short):
    given = {"policy": "last", "layers": "[4, 6]", "steps": "100", "split": "proportional"}
    key, _, value = short.partition(": ")
    text = ", ".join(f"{k}: {v}" for k, v in {**given, key: value}.items())
    assert problems(f"stages={{{text}}}")


def test_settings_of_a_growth_alone_are_checked_too():
    assert parse_growth({}, source="x") == GrowthConfig()
    for wrong in ({"max_loss": float("nan")}, {"eta": True}, {"lag": -1}, {"rung_timeout": 0}):
        with pytest.raises(ConfigError, match=f"1 problem in x\n  {next(iter(wrong))}: must"):
            parse_growth(wrong, source="x")


def test_the_largest_numbers_are_taken():
    assert config(f"seed={2**63 - 1}").seed == 2**63 - 1


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "2", None, 11, float("nan")])
def test_whole_numbers_from_options(value):
    assert require_whole(3, "--workers", error=PlanError, least=1, most=10) == 3
    with pytest.raises(PlanError, match="--workers: expected a whole number from 1 to 10"):
        require_whole(value, "--workers", error=PlanError, least=1, most=10)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "2", None])
def test_finite_numbers_from_options(value):
    assert require_positive(2, "--init-std", error=PlanError) == 2.0
    with pytest.raises(PlanError, match="--init-std: expected a finite number above 0"):
        require_positive(value, "--init-std", error=PlanError)
