"""W&B's environment variables: what each changes, and that the configuration comes first."""

import os

import pytest

from lag_megatron.config import WandbConfig
from lag_megatron.errors import ConfigError
from lag_megatron.run.wandb_environment import unset_empty_variables, wandb_places

KEY = {"WANDB_API_KEY": "secret"}


@pytest.fixture
def places(tmp_path):
    """The places of the run `tiny`, given variables and the configuration's keys."""
    home = {"NETRC": str(tmp_path / "no netrc")}

    def find(environment, **config):
        return wandb_places(WandbConfig(**config), tmp_path / "tiny", home | environment)

    return find


@pytest.mark.parametrize(
    ("environment", "config", "mode"),
    [
        ({}, "auto", "offline"),
        (KEY, "auto", "online"),
        ({"WANDB_MODE": "online"}, "auto", "online"),
        (KEY | {"WANDB_MODE": "offline"}, "auto", "offline"),
        (KEY | {"WANDB_MODE": "dryrun"}, "auto", "offline"),
        (KEY | {"WANDB_MODE": "disabled"}, "auto", "disabled"),
        (KEY | {"WANDB_MODE": ""}, "auto", "online"),
        (KEY | {"WANDB_DISABLED": "true"}, "auto", "disabled"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "1"}, "auto", "disabled"),
        (KEY | {"WANDB_DISABLED": "False"}, "auto", "online"),
        (KEY | {"WANDB_DISABLED": ""}, "auto", "online"),
        ({"WANDB_MODE": "disabled"}, "online", "online"),
        ({"WANDB_DISABLED": "true"}, "offline", "offline"),
        ({"WANDB_MODE": "unknown"}, "disabled", "disabled"),
    ],
)
def test_mode(places, environment, config, mode):
    assert places(environment, mode=config).mode == mode


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WANDB_MODE": "ofline"}, "WANDB_MODE is 'ofline', expected one of online, offline"),
        ({"WANDB_DISABLED": "maybe"}, "WANDB_DISABLED is 'maybe', expected one of 1, on"),
    ],
)
def test_an_unknown_value_is_refused_with_its_variable(places, environment, message):
    with pytest.raises(ConfigError, match=message):
        places(environment)


def test_places_without_variables_are_the_run_s(places, tmp_path):
    found = places({"WANDB_DIR": "", "WANDB_PROJECT": "", "WANDB_NAME": "", "WANDB_RUN_GROUP": ""})
    assert (found.project, found.group, found.name) == ("lag-megatron", "tiny", "tiny")
    assert found.folder == tmp_path / "tiny"
    assert found.files == tmp_path / "tiny/wandb"


def test_places_of_variables(places, tmp_path):
    given = {"WANDB_DIR": str(tmp_path / "logs"), "WANDB_PROJECT": "p", "WANDB_NAME": "n"}
    found = places(given | {"WANDB_RUN_GROUP": "g"})
    assert (found.project, found.group, found.name) == ("p", "g", "n")
    assert found.files == tmp_path / "logs/wandb"
    assert places(given, project="configured").project == "configured"


def test_empty_variables_are_unset(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    unset_empty_variables()
    assert "WANDB_MODE" not in os.environ
    assert os.environ["WANDB_TAGS"] == "a,b"
