"""Runs that begin at the weights of another checkpoint, of every format."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_ranks, sparing

from lag_megatron.cli import convert_checkpoint
from lag_megatron.config import load_config
from lag_megatron.errors import CheckpointError

STAGE = "stages=[{steps: 4}]"


def convert(*arguments):
    return convert_checkpoint.main([str(argument) for argument in arguments])


def train(config_path, run_dir, overrides):
    from lag_megatron.training.train import TrainRequest, train

    train(TrainRequest(load_config(config_path, overrides=overrides), Path(run_dir), "auto"))


def validation(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}


@pytest.fixture(scope="module")
def grown(tmp_path_factory, tiny_tree):
    """A run to its end: three layers, one of them grown, and its last state in every format."""
    folder = tmp_path_factory.mktemp("grown")
    run_ranks(train, 1, tiny_tree(folder), folder / "run", [])
    last = folder / "run" / "stage01"
    for form in ("universal", "megatron", "hf"):
        assert convert(last, folder / form, "--to", form) == 0
    shutil.copytree(last, folder / "zero")
    return folder


@pytest.mark.parametrize(
    ("form", "world", "overrides"),
    sparing(
        [
            ("hf", 2, ["parallel.zero_stage=3"]),
            ("universal", 1, ["parallel.zero_stage=0"]),
            ("megatron", 2, ["parallel.tensor=2"]),
            ("zero", 2, ["parallel.precision=bf16"]),
            ("zero", 1, ["parallel.zero_stage=0", "optimizer.name=adafactor"]),
        ],
        slow=lambda case: case[0] != "hf",
    ),
)
def test_the_first_loss_is_the_last_of_the_other(form, world, overrides, grown, tiny, tmp_path):
    expected = validation(grown / "run")[20]
    overrides = [STAGE, "model.num_layers=3", f"checkpoint.initial={grown / form}", *overrides]
    run_ranks(train, world, tiny, tmp_path / "run", overrides)
    found = validation(tmp_path / "run")
    tolerance = 2e-2 if "parallel.precision=bf16" in overrides else 1e-5
    assert found[0] == pytest.approx(expected, abs=tolerance)
    assert found[4] != found[0]
    history = convert(tmp_path / "run" / "stage00", tmp_path / "out", "--to", "hf", "--dry-run")
    assert history == 0


def test_the_history_goes_on_and_so_does_a_run(grown, tiny, tmp_path):
    overrides = [STAGE, "model.num_layers=3", f"checkpoint.initial={grown / 'zero'}"]
    run_ranks(train, 1, tiny, tmp_path / "run", overrides)
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint

    state = ZeroCheckpoint.open(tmp_path / "run" / "stage00" / "step00000004").client_state
    assert [plan["target_layers"] for plan in state["growth_history"]] == [3]
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.move(grown / "zero", grown / "away")  # a run that stands somewhere needs it no more
    try:
        run_ranks(train, 1, tiny, tmp_path / "run", overrides)
    finally:
        shutil.move(grown / "away", grown / "zero")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("override", "message"),
    sparing(
        [
            ("model.norm_eps=0.001", "model.norm_eps is 0.001, there 1e-05"),
            ("model.num_layers=2", "holds another architecture than the configuration"),
            ("checkpoint.initial=/nowhere", "/nowhere: no such checkpoint directory"),
        ],
        slow=lambda case: "norm_eps" not in case[0],
    ),
)
def test_another_model_is_refused(override, message, grown, tiny, tmp_path):
    overrides = [STAGE, "model.num_layers=3", f"checkpoint.initial={grown / 'zero'}", override]
    with pytest.raises(CheckpointError, match=message):
        run_ranks(train, 2, tiny, tmp_path / "run", overrides)
