"""What all commands share: a module each, help that fits a screen, a version, completion."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from console_commands import entry_points

from lag_megatron import __version__

MAX_LINES, COLUMNS = 50, 100


NAMES = {
    "lag-train": "train",
    "lag-grow": "grow_checkpoint",
    "lag-respread": "respread_checkpoint",
    "lag-convert": "convert_checkpoint",
    "lag-inspect": "inspect_checkpoint",
    "lag-report": "report",
    "lag-evaluate": "evaluate",
    "lag-prepare-data": "prepare_data",
    "lag-plan-stages": "plan_stages",
    "lag-compare-policies": "compare_policies",
}


def run(module, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", f"lag_megatron.cli.{module}", *arguments],
        cwd=ROOT, env={**os.environ, "COLUMNS": str(COLUMNS), **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_every_program_has_a_console_command():
    expected = {name: f"lag_megatron.cli.{module}:main" for name, module in NAMES.items()}
    assert entry_points() == expected
    programs = {path.stem for path in (ROOT / "tools").glob("*.py")} | {"train"}
    assert programs == set(NAMES.values())


@pytest.mark.parametrize(("command", "module"), NAMES.items())
def test_help_fits_a_screen_and_ends_in_two_examples(command, module, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    program = importlib.import_module(f"lag_megatron.cli.{module}")
    monkeypatch.setattr(sys, "argv", [program.__file__])  # as ``python -m`` sets it
    lines = program._parser().format_help().rstrip().splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= COLUMNS
    assert lines[0].startswith(f"usage: python -m lag_megatron.cli.{module} [options]")
    assert lines[-3] == "examples:"
    assert any(command in line or "lag_megatron.cli" in line for line in lines[-2:])


@pytest.mark.parametrize("module", ["train", "report", "plan_stages"])
def test_version(module):
    assert run(module, "--version").stdout == f"lag_megatron {__version__}\n"


def test_a_program_is_called_by_its_own_name():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plan_stages.py"), "--help"],
        env=os.environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("usage: plan_stages.py [options]")


def test_a_shell_can_complete_options(tmp_path):
    """As bash does after ``eval "$(register-python-argcomplete lag-report)"``."""
    line = "lag-report --gro"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "IFS": "\v"}
    found = tmp_path / "found"
    run("report", **asked, _ARGCOMPLETE_STDOUT_FILENAME=str(found))
    assert found.read_text().split("\v") == ["--growth "]


def test_configurations_are_listed_with_a_line_each():
    lines = run("train", "--list-configs").stdout.splitlines()
    names = [line.split()[0] for line in lines]
    folder = ROOT / "configs"
    files = [*folder.glob("*.yaml"), *folder.glob("studies/*.yaml")]
    assert sorted(names) == sorted(str(file.relative_to(folder).with_suffix("")) for file in files)
    for line in lines:
        assert len(line) <= 120
        assert re.fullmatch(r"\S+  +\S.+\S", line)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("demo", "configs/demo.yaml"),
        ("demo.yaml", "configs/demo.yaml"),
        ("studies/raptr_bert_small", "configs/studies/raptr_bert_small.yaml"),
        ("configs/demo.yaml", "configs/demo.yaml"),
    ],
)
def test_a_name_without_a_path_is_a_configuration_of_the_package(text, found, monkeypatch):
    from lag_megatron.config.installed import find_config

    monkeypatch.chdir(ROOT)
    assert find_config(text).resolve() == ROOT / found


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    from lag_megatron.config.installed import find_config

    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("model: {}")
    assert find_config("demo") == Path("demo")


def test_an_unknown_name_is_refused_with_the_nearest_ones():
    done = run("train", "--config", "dmo")
    assert done.returncode == 2
    assert "dmo: neither a file nor a configuration" in done.stderr
    assert "Did you mean demo?" in done.stderr


def test_outside_a_checkout_caches_are_the_users(tmp_path, monkeypatch):
    from lag_megatron.config import installed

    assert installed.cache_dir() == ROOT / ".cache"
    monkeypatch.setattr(installed, "PACKAGE", tmp_path / "site-packages" / "lag_megatron")
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert installed.cache_dir(home) == tmp_path / "lag_megatron"
    default = Path.home() / ".cache" / "lag_megatron"
    assert installed.cache_dir({}) == installed.cache_dir({"XDG_CACHE_HOME": "x"}) == default
