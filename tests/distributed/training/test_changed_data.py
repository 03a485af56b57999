"""Prepared data that changes under a run: all ranks end before the next checkpoint is committed."""

import json
from pathlib import Path

import pytest
from conftest import run_ranks
from whole_runs import lines_of, train

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import DataError


def change_at_step_3():
    """Rank 1 finds a change before its third step, as its process beside would."""
    from lag_megatron.training.training_context import TrainingContext

    step = TrainingContext.step

    def with_change(self, engine, number, *, stage):
        if number == 2 and engine.world.rank == 1:
            check = self.require_sound_data.__self__
            check._problem = DataError("train.bin: bytes 0 to 4,096: its bytes are not those")
            self.stop.ask("prepared data was changed")
        return step(self, engine, number, stage=stage)

    TrainingContext.step = with_change


def train_on_changed(config, run_dir):
    with pytest.raises(DataError) as caught:
        train(config, run_dir, ["checkpoint.interval=3"], fault=change_at_step_3)
    return str(caught.value)


def test_a_change_that_one_rank_finds_ends_all_before_the_next_checkpoint(tiny, tmp_path):
    messages = run_ranks(train_on_changed, 2, tiny, tmp_path / "run")
    assert messages == ["train.bin: bytes 0 to 4,096: its bytes are not those"] * 2
    assert manifest.committed_tags(tmp_path / "run" / "stage00") == []


def test_text_that_was_overwritten_in_place_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    run_ranks(train, 2, tiny, run, ["stages=[{steps: 4}]"])
    (event,) = [line for line in lines_of(run, "journal.jsonl") if line["event"] == "data_compared"]
    assert event["bytes"] == event["total"] > 0
    folder = Path(json.loads((run / "run.json").read_text())["data_folder"])
    content = bytearray((folder / "train.bin").read_bytes())
    content[100] ^= 1
    (folder / "train.bin").write_bytes(content)
    for message in run_ranks(refused, 2, tiny, tmp_path / "other"):
        assert "train.bin: its bytes are not those that were written (xxh3" in message


def refused(config, run_dir):
    with pytest.raises(DataError) as caught:
        train(config, run_dir, ["stages=[{steps: 4}]"])
    return str(caught.value)
