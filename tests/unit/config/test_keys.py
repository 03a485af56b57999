"""Keys and values that no configuration has: each is reported in a line, and all at once."""

import pytest
from configuring import problems

from lag_megatron.config import parse_config
from lag_megatron.errors import ConfigError, LagError


def test_config_errors_are_lag_errors():
    assert issubclass(ConfigError, LagError)
    assert issubclass(LagError, ValueError)


@pytest.mark.parametrize(
    ("override", "path", "near"),
    [
        ("modle=3", "modle", "model"),
        ("model.num_layer=3", "model.num_layer", "num_layers"),
        ("model.num-layers=3", "model.num-layers", "num_layers"),
        ("data.tokenizer.vocabsize=3", "data.tokenizer.vocabsize", "vocab_size"),
        ("optimizer.schedule.warmup=3", "optimizer.schedule.warmup", "warmup_steps"),
        ("parallel.zero=3", "parallel.zero", "zero_stage"),
        ("growth.rung=3", "growth.rung", "rungs"),
        ("growth.pool.indices=3", "growth.pool.indices", "index"),
        ("stages[0].step=3", "stages.0.step", "steps"),
        ("stages[1].growth.lagg=3", "stages.1.growth.lagg", "lag"),
        ("tracking.wandb.projects=x", "tracking.wandb.projects", "project"),
    ],
)
def test_unknown_key_with_nearest(override, path, near):
    (line,) = problems(override)
    assert line.startswith(f"{path}: unknown key (got ")
    assert f"Did you mean {near!r}? Known keys: " in line


def test_unknown_key_that_resembles_nothing():
    (line,) = problems("model.zzz=1")
    assert "Did you mean" not in line
    assert "Known keys: family, num_layers, hidden_size" in line


def test_every_mistake_at_once():
    lines = problems(
        "model.num_layer=3",
        "model.hidden_size=wide",
        "parallel.precision=fp16",
        "growth.pool.index=foo",
        "stages[1].steps=many",
        "checkpoint=3",
    )
    paths = {line.partition(":")[0] for line in lines}
    assert paths == {
        "model.num_layer",
        "model.hidden_size",
        "parallel.precision",
        "growth.pool.index",
        "stages.1.steps",
        "checkpoint",
    }


def test_every_contradiction_at_once():
    assert (
        len(problems("optimizer.lr=0", "model.dropout=1", "growth.lag=301", "data.paths=[x]")) == 4
    )


def test_missing_keys():
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"num_layers": 3}})
    text = str(caught.value)
    assert "  stages: required, but not given." in text
    assert "  model.hidden_size: required, but not given." in text
    assert "num_layers" not in text


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.num_layers=x", "model.num_layers: must be a whole number (got 'x')."),
        ("model.num_layers=2.5", "model.num_layers: must be a whole number (got 2.5)."),
        ("model.bias=3", "model.bias: must be true or false (got 3)."),
        ("model.vocab_size=x", "model.vocab_size: must be a whole number or 'auto' (got 'x')."),
        ("model=3", "model: must be a mapping (got 3)."),
        ("model=", "model: must be a mapping (got None)."),
        ("stages=3", "stages: must be a list of mappings (got 3)."),
        ("data.paths=a.txt", "data.paths: must be a list of strings (got 'a.txt')."),
        ("data.text_key=3", "data.text_key: must be a string (got 3)."),
        ("optimizer.lr=fast", "optimizer.lr: must be a number (got 'fast')."),
        (
            "optimizer.betas=[1, 2, 3]",
            "optimizer.betas: must be a list of 2 numbers (got [1, 2, 3]).",
        ),
        ("optimizer.betas=[0.9, x]", "optimizer.betas.1: must be a number (got 'x')."),
        ("parallel.zero_stage=4", "parallel.zero_stage: must be 0, 1, 2 or 3 (got 4)."),
        ("parallel.world_size=x", "parallel.world_size: must be a whole number or null (got 'x')."),
        ("stages[1].growth=3", "stages.1.growth: must be a mapping or null (got 3)."),
        ("growth.rungs=5", "growth.rungs: must be a list of whole numbers (got 5)."),
        (
            "growth.pool.init=[zero]",
            "growth.pool.init.0: must be 'duplicate' or 'random' (got 'zero').",
        ),
        (
            "growth.pool.init=random",
            "growth.pool.init: must be a list of 'duplicate' or 'random' (got 'random').",
        ),
        ("growth.pool.scale=1", "growth.pool.scale: must be a list of numbers (got 1)."),
        ("growth.pool.options=x", "growth.pool.options: must be a mapping (got 'x')."),
        (
            "growth.pool.index=foo",
            "growth.pool.index: must be 'all' or 'even', a whole number or a list of whole numbers "
            "(got 'foo').",
        ),
        (
            "growth.pool.index=[0, foo]",
            "growth.pool.index: must be 'all' or 'even', a whole number or a list of whole numbers "
            "(got [0, 'foo']).",
        ),
    ],
)
def test_wrong_values_are_one_line_each(override, line):
    assert problems(override) == [line]


def test_a_mistake_in_the_global_growth_is_told_once():
    assert len(problems("growth.pool.index=foo", "stages[1].growth={lag: 3}")) == 1
    assert len(problems("growth.lagg=3", "stages[1].growth={lag: 3}")) == 1


def test_a_deeper_mistake_of_a_stage_is_told_besides():
    assert len(problems("growth.lag=x", "stages[1].growth={lag: y}")) == 2
