"""`--set`: what it changes, in which order, and where it leads nowhere."""

import re

import pytest
import yaml
from configuring import BASE, config, write

from lag_megatron.config import load_config
from lag_megatron.config.load import merge
from lag_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("optimizer.lr=3e-4", lambda c: c.optimizer.lr, 3e-4),
        ("optimizer.lr=0.01", lambda c: c.optimizer.lr, 0.01),
        ("stages.0.steps=7", lambda c: c.stages[0].steps, 7),
        ("stages[1].steps=700", lambda c: c.stages[1].steps, 700),
        ("stages=[{steps: 3}]", lambda c: c.total_steps, 3),
        ("data={source: text, paths: [a b.txt]}", lambda c: c.data.paths, ("a b.txt",)),
        ("growth.pool.index=[0, 1]", lambda c: c.growth.pool.index, (0, 1)),
        ("growth.pool.index=1", lambda c: c.growth.pool.index, 1),
        ("growth.pool.index=all", lambda c: c.growth.pool.index, "all"),
        ("tracking.wandb.project=a=b", lambda c: c.tracking.wandb.project, "a=b"),
        ("optimizer.schedule.decay_steps=null", lambda c: c.optimizer.schedule.decay_steps, None),
        ("stages[1].growth.lag=9", lambda c: c.stages[1].growth.lag, 9),
        (
            "deepspeed.comms_logger.enabled=true",
            lambda c: c.deepspeed,
            {"comms_logger": {"enabled": True}},
        ),
    ],
)
def test_set(tmp_path, override, get, value):
    path = write(tmp_path / "a.yaml", BASE)
    assert get(load_config(path, overrides=[override])) == value


def test_the_last_set_wins(tmp_path):
    path = write(tmp_path / "a.yaml", BASE)
    assert load_config(path, overrides=["seed=1", "seed=2"]).seed == 2


def test_set_below_an_empty_section(tmp_path):
    path = write(tmp_path / "a.yaml", yaml.safe_dump(BASE) + "growth:\n")
    assert load_config(path, overrides=["growth.lag=3"]).growth.lag == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("seed=[", "it cannot be read as YAML"),
        ("stages[5].steps=3", "'5' is not an index below 2"),
        ("stages.last.steps=3", "'last' is not an index below 2"),
        ("stages[2]={steps: 3}", "'2' is not an index below 2"),
        ("model.num_layers.x=3", "'x' lies inside a value that is not a mapping"),
        ("model.num_layers.x.y=3", "'x' lies inside a value that is not a mapping"),
    ],
)
def test_set_that_goes_nowhere(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        config(override)
    assert str(caught.value).startswith(f"--set {override}: ")


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]}
    assert merge(base, over) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert (base, over) == ({"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]})
