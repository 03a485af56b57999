"""A user's mistake is one message and exit code 2, before anything is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import ROOT


def call(script, *arguments, cwd=ROOT):
    """Run a program as a user does; returns exit code, output and error text."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_layer=3"], "Did you mean 'num_layers'?"),
        (["parallel.zero_stage=4", "optimzer={}"], "2 problems"),
        (["growth.pool.index=7"], "index 7 is out of range"),
        (["growth.pool.block_size=2"], "block_size 2 does not divide"),
        (["stages=[{steps: 4}, {steps: 4, num_layers: 5}]"], "Largest target: 4"),
        (["stages=[{steps: 4}, {steps: 4, num_layers: 1}]"], "stages only grow"),
        (["parallel.micro_batch=3"], "do not divide"),
        (["parallel.world_size=2"], "configured for 2 ranks, but 1"),
        (["growth.lag=11", "growth.rungs=[11]"], "longer than the stage"),
        (["data.paths=[nowhere.txt]"], "nowhere.txt"),
        (["model.vocab_size=128"], "smaller than the tokenizer's"),
        (["model"], "expected key.path=value"),
    ],
)
def test_mistakes_in_the_configuration(overrides, message, tiny, tmp_path):
    options = [word for override in overrides for word in ("--set", override)]
    code, _, error = call(
        "launch/train.py", "--config", tiny, "--run-dir", tmp_path / "run", *options
    )
    assert (code, message in error) == (2, True), error
    assert "Traceback" not in error
    assert not list((tmp_path / "run").glob("stage*"))


def test_a_missing_configuration_names_its_neighbours(tiny):
    code, _, error = call("launch/train.py", "--config", tiny.parent / "tyni.yaml", "--dry-run")
    assert code == 2
    assert "tiny.yaml" in error


def test_deepspeed_json_may_not_contradict(tiny, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 99, "zero_optimization": {"stage": "auto"}}))
    code, _, error = call(
        "launch/train.py", "--config", tiny, "--deepspeed_config", path, "--dry-run"
    )
    assert code == 2
    assert "train_batch_size: 99 contradicts 8" in error


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_dry_runs(path, tmp_path):
    code, output, error = call(
        "launch/train.py", "--config", path, "--run-dir", tmp_path / "run", "--dry-run"
    )
    assert code == 0, error
    grows = "raptr" not in path.name  # the others do
    for title in ("stages", "memory", *["growth 1"] * grows, "learning rate"):
        assert f"== {title} ==" in output
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_ranks_of_a_hostfile(tiny, tmp_path):
    hosts = tmp_path / "hostfile"
    hosts.write_text("# two hosts\na slots=2\nb slots=2\n")
    code, output, _ = call("launch/train.py", "--config", tiny, "--dry-run", "--hostfile", hosts)
    assert code == 0
    assert "4 ranks" in output


def test_a_hostfile_without_a_dry_run_is_refused(tiny, tmp_path):
    hosts = tmp_path / "hostfile"
    hosts.write_text("a slots=2\n")
    code, _, error = call(
        "launch/train.py", "--config", tiny, "--run-dir", tmp_path / "run", "--hostfile", hosts
    )
    assert code == 2
    assert f"--hostfile {hosts}: it counts the ranks of a --dry-run" in error
    assert f"deepspeed --hostfile {hosts} --module lag_megatron.cli.train" in error
    assert not (tmp_path / "run").exists()


def test_the_options_are_frozen():
    code, output, _ = call("launch/train.py", "--help")
    options = {word for word in output.replace(",", " ").split() if word.startswith("--")}
    assert code == 0
    assert options == {
        "--help", "--config", "--set", "--run-dir", "--resume", "--dry-run", "--deepspeed_config",
        "--hostfile", "--list-configs", "--version", "--verify-data",
        "--num_gpus", "--module",  # of the launchers, in the examples
    }  # fmt: skip


def test_one_rank_needs_no_launcher(tiny, tmp_path):
    code, output, error = call(
        "launch/train.py", "--config", tiny, "--run-dir", tmp_path / "run",
        "--deepspeed_config", ROOT / "configs" / "ds" / "zero1.json",
        "--set", "stages=[{steps: 3}]",
    )  # fmt: skip
    assert code == 0, error
    assert f"report: {tmp_path / 'run' / 'report.html'}" in output.splitlines()[-1]
    assert Path(output.splitlines()[-1].removeprefix("report: ")).is_file()
