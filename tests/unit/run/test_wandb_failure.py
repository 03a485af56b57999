"""A failing W&B, the real package in a process of its own: one line, and the program goes on."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from lag_megatron.config import TrackingConfig, WandbConfig
from lag_megatron.run.metrics import Console
from lag_megatron.run.wandb_logger import Wandb

what, folder = sys.argv[1], Path(sys.argv[2])
tracking = TrackingConfig(wandb=WandbConfig(mode="offline"))
run = Wandb(tracking, folder=folder, config={"values": list(range(2000))}, console=Console())

def log(steps):
    for step in steps:
        values = {f"train/{name}": float(step) for name in range(50)}
        run.log({"step": step, "tokens": step, "stage": 0, **values})

log(range(1, 50))
if what == "killed":
    while not list(folder.glob("wandb/offline-run-*/*.wandb")):
        time.sleep(0.05)
    own = ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())]
    for line in subprocess.run(own, capture_output=True, text=True).stdout.splitlines():
        if "wandb-core" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    time.sleep(1)
log(range(50, 100))
run.log({"step": 100, "tokens": 100, "stage": 1, "train/loss": 1.0})
run.finish(exit_code=0)
print("the run has ended")
"""


def run_program(what, folder, *, prefix=()):
    """Standard error of the program, which must reach its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    result = subprocess.run(
        [*prefix, sys.executable, "-c", PROGRAM, what, str(folder)],
        env=clean | {"PYTHONPATH": str(ROOT), "HOME": str(folder.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "the run has ended"
    return result.stderr


def test_a_file_in_place_of_the_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wandb").write_text("not a folder")
    (line,) = run_program("file", folder).splitlines()
    assert f"{folder}/wandb: FileExistsError" in line
    assert "set WANDB_DIR to another folder" in line


def test_the_process_of_wandb_is_killed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (line,) = run_program("killed", folder).splitlines()
    assert line.startswith(f"W&B failed and is off for this run, which goes on: {folder}/wandb: ")


def may_mount():
    trial = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(trial, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="only root may mount a small file system")
def test_a_full_disk(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    mount = f'mount -t tmpfs -o size=100k tmpfs {folder} && exec "$@"'
    (line,) = run_program(
        "full", folder, prefix=["unshare", "-m", "sh", "-c", mount, "sh"]
    ).splitlines()
    assert f"{folder}/wandb" in line
    assert "No space left on device. Make room there" in line
