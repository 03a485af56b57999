"""How commands end: by Ctrl-C, before and after they begin, and when nobody reads their output."""

import importlib
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from console_commands import entry_points

MODULES = sorted(target.partition(":")[0] for target in entry_points().values())


@pytest.fixture
def _handlers():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def start(module, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", f"lag_megatron.cli.{module}", *arguments],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("module", MODULES)
def test_ctrl_c_is_one_line_and_130(module, monkeypatch, capsys):
    command = importlib.import_module(module)

    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "parse", interrupt)
    assert command.main([]) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("interrupted. The same command ")
    assert printed.err.count("\n") == 1


def test_ctrl_c_while_modules_are_imported(tmp_path):
    """Importing torch takes seconds, in which nothing of the command runs."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = start("grow_checkpoint", env={**os.environ, "PYTHONPATH": path})
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "interrupted. Nothing was begun.\n"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("train", ["--config", "demo", "--dry-run"]),
        ("train", ["--list-configs"]),
        ("plan_stages", []),
        ("compare_policies", ["studies/raptr_bert_small", "--dry-run"]),
    ],
)
def test_a_reader_that_ends_ends_the_command_quietly(module, arguments):
    """As ``head -3`` does, of a pipe that is closed from the beginning."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start(module, *arguments, stdout=writer)
    os.close(writer)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (141, "")


def test_another_broken_pipe_is_not_taken_for_it(monkeypatch):
    report = importlib.import_module("lag_megatron.cli.report")

    def fail(*given):
        raise BrokenPipeError

    monkeypatch.setattr(report, "parse", fail)
    with pytest.raises(BrokenPipeError):
        report.main([])


def test_output_that_cannot_be_written_is_one_message():
    with open("/dev/full", "w") as full:
        process = start("plan_stages", stdout=full)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("standard output, or a file: cannot be written: No space")
    assert error.count("\n") == 1
