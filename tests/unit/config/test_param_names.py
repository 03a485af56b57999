"""The names file: what it may say, one error for each mistake, and how a configuration gives it."""

import pytest
import yaml

from lag_megatron.config import dump_config, load_config
from lag_megatron.config.schema.param_names import ParamNames, parse_param_names, read_param_names
from lag_megatron.errors import ConfigError

MODEL = (
    "model: {num_layers: 2, hidden_size: 8, ffn_hidden_size: 8, num_attention_heads: 2, "
    "num_query_groups: 2, seq_length: 8}\n"
)
GOOD = 'roles: {"*.ln_?.weight": norm_weight, "*.gamma": layer_scale}\nlayers: "blocks.{}"\n'


def test_both_parts_and_each_alone(tmp_path):
    file = tmp_path / "names.yaml"
    file.write_text(GOOD)
    roles = {"*.ln_?.weight": "norm_weight", "*.gamma": "layer_scale"}
    assert read_param_names(file) == ParamNames(roles, "blocks.{}")
    assert parse_param_names({"layers": "h.{}"}, where="x") == ParamNames({}, "h.{}")
    assert parse_param_names({"roles": roles}, where="x") == ParamNames(roles)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roles: {a: norm}", r"'a' has the unknown role 'norm'\. The roles are norm_weight, "),
        ("roles: {a: [bias]}", r"'a' has the unknown role \['bias'\]"),
        ("roles: {1: bias}", "the pattern 1 is not text"),
        ("roles: [a]", r"roles must be a mapping .*got \['a'\]"),
        ("role: {a: bias}", "unknown key 'role'. Its keys are roles and layers"),
        ("", "it is empty"),
        ("- a", "expected a mapping"),
        ("layers: blocks", r"layers must be .*one \{\} .*got 'blocks'"),
        ('layers: "a.{}.b.{}"', "layers must be"),
        ('layers: "a.{}.b"', "layers must be"),
        ("layers: 3", "layers must be .*got 3"),
        ("roles: {a: bias, a: bias}", "the key 'a' is given twice"),
        ("roles: {", "it cannot be read as YAML"),
    ],
)
def test_mistakes(text, message, tmp_path):
    file = tmp_path / "names.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_param_names(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml: expected names of .*no such file"):
        read_param_names(tmp_path / "no.yaml")


def config_file(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(f"{MODEL}stages: [{{steps: 1}}]\n{text}\n")
    return folder / "run.yaml"


def test_a_configuration_holds_what_the_file_says(tmp_path):
    config = config_file(tmp_path / "a", "growth: {names: names.yaml}")
    (tmp_path / "a" / "names.yaml").write_text(GOOD)
    loaded = load_config(config)
    assert loaded.growth.names == yaml.safe_load(GOOD)
    (tmp_path / "again.yaml").write_text(dump_config(loaded))
    assert load_config(tmp_path / "again.yaml") == loaded
    # A path is relative to the file that gives it, also to one that is extended.
    (tmp_path / "b.yaml").write_text("extends: a/run.yaml\n")
    assert load_config(tmp_path / "b.yaml").growth.names == loaded.growth.names
    given = load_config(config, overrides=["growth.names={layers: 'h.{}'}"])
    assert given.growth.names == {"layers": "h.{}"}


def test_mistakes_are_told_with_the_others(tmp_path):
    wrong = "growth: {names: {roles: {a: norm}}}\noptimizer: {lr: -1}"
    with pytest.raises(ConfigError, match=r"growth\.names: 'a' has the unknown role") as caught:
        load_config(config_file(tmp_path / "c", wrong))
    assert "optimizer.lr" in str(caught.value)
    assert str(caught.value).count("unknown role") == 1
