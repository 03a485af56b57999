"""Configuration files: `extends`, files that are none, and what is dumped is read back."""

import re

import pytest
import yaml
from configuring import BASE, config, tree, write
from hypothesis import given
from hypothesis import strategies as st

from lag_megatron.config import dump_config, load_config, parse_config
from lag_megatron.errors import ConfigError


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path):
    write(tmp_path / "base.yaml", {**BASE, "growth": {"lag": 10, "rungs": [5, 10]}})
    (tmp_path / "more").mkdir()
    middle = {"extends": "../base.yaml", "growth": {"rungs": [10]}, "seed": 7}
    write(tmp_path / "more" / "middle.yaml", middle)
    top = write(tmp_path / "top.yaml", {"extends": "more/middle.yaml", "stages": [{"steps": 9}]})
    run = load_config(top)
    assert (run.growth.lag, run.growth.rungs) == (10, (10,))
    assert (run.seed, run.total_steps, run.model.hidden_size) == (7, 9, 32)


def test_extends_in_a_circle(tmp_path):
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    with pytest.raises(ConfigError, match=r"extends itself \(a\.yaml -> b\.yaml -> a\.yaml\)"):
        load_config(tmp_path / "a.yaml")


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "real.yaml", BASE)
    with pytest.raises(ConfigError, match=r"rael\.yaml: no such .*Files there: real\.yaml"):
        load_config(tmp_path / "rael.yaml")
    with pytest.raises(ConfigError, match=r"no such configuration file\.$"):
        load_config(tmp_path / "nowhere" / "a.yaml")


def test_a_missing_base(tmp_path):
    path = write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    with pytest.raises(ConfigError, match=r"b\.yaml: no such .*Files there: a\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("", "expected a configuration as YAML, but it is empty"),
        ("# a: 1", "expected a mapping at the top, got nothing"),
        ("- 1", "expected a mapping at the top, got a list"),
        ("seed: 1\nmodel: {}\nseed: 2\n", "the key 'seed' is given twice"),
        ("model: {bias: true, bias: false}", "the key 'bias' is given twice"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_not_a_text_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"a\.yaml: .*it is not UTF-8"):
        load_config(path)
    with pytest.raises(ConfigError, match="it cannot be read: Is a directory"):
        load_config(tmp_path)


def test_an_error_names_its_file(tmp_path):
    path = write(tmp_path / "a.yaml", tree("model.bias=3"))
    with pytest.raises(ConfigError, match=re.escape(f"1 problem in {path}")):
        load_config(path)


def test_dump_round_trip(tmp_path):
    run = config(
        "stages[1].growth={lag: 9}",
        "growth.pool.index=[0, 2]",
        "deepspeed.x.y=[1]",
        "growth.pool.scale=[1, 0]",
    )
    path = write(tmp_path / "a.yaml", dump_config(run))
    assert load_config(path) == run


@given(
    lr=st.floats(1e-12, 1e3),
    eps=st.floats(1e-300, 1.0),
    steps=st.integers(1, 10**9),
    project=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    world_size=st.none() | st.integers(1, 64).map(lambda replicas: 4 * replicas),
)
def test_dump_round_trip_of_any_value(lr, eps, steps, project, world_size):
    values = tree()
    values["optimizer"] = {"lr": lr, "eps": eps}
    values["stages"] = [{"steps": steps}]
    values["tracking"] = {"wandb": {"project": project}}
    values["parallel"] = {"world_size": world_size, "micro_batch": 1, "global_batch": 4 * 2**20}
    values["parallel"]["global_batch"] *= world_size or 1
    run = parse_config(values)
    assert parse_config(yaml.safe_load(dump_config(run))) == run
