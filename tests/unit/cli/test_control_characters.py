"""Control characters in paths and keys reach no terminal: every program shows them escaped."""

import json
import shutil

import pytest
from converting import convert
from programs import grow, inspect, program

from lag_megatron.run.metrics import Console

ODD = "red\x1b[31m\x07"
SHOWN = r"red\x1b[31m\x07"
LAST = ("--operator", "last", "--layers", 3)
PROGRAMS = {
    "grow": lambda source, target: grow(source, target, *LAST),
    "respread": lambda s, t: program("respread_checkpoint")(s, t, "--world-size", 1),
    "convert": lambda s, t: convert(s, t, "--to", "universal", "--verify"),
    "convert to hf": lambda s, t: convert(s, t, "--to", "hf"),
    "inspect": lambda source, target: inspect(source),
}


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A source in an odd folder, with an odd key beside it."""
    shutil.copytree(checkpoint, tmp_path / ODD / "step3")
    (tmp_path / ODD / "config.json").write_text(json.dumps({"n_layer": 2, f"layer{ODD}": [1, 2]}))
    return tmp_path / ODD


@pytest.mark.parametrize("name", PROGRAMS)
def test_paths_of_source_and_target(name, folder, tmp_path, capsys):
    assert PROGRAMS[name](folder / "step3", tmp_path / f"to {ODD}") == 0
    said = capsys.readouterr()
    text = said.out + said.err
    assert SHOWN in text
    assert all(c.isprintable() or c in "\n\t" for c in text), text


@pytest.mark.parametrize("name", PROGRAMS)
def test_messages_of_errors(name, tmp_path, capsys):
    assert PROGRAMS[name](tmp_path / ODD, tmp_path / "out") != 0
    said = capsys.readouterr()
    assert SHOWN in said.err + said.out
    assert "\x1b" not in said.err + said.out


def test_lines_of_a_run(capsys):
    Console().print(f"report: {ODD}")
    Console().warn(f"W&B: {ODD}")
    assert capsys.readouterr() == (f"report: {SHOWN}\n", f"W&B: {SHOWN}\n")
