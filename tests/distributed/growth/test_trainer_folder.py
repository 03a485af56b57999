"""A folder of transformers' Trainer that was moved or grown is one that its Trainer resumes."""

import json

import pytest
import trainer_runs
from conftest import run_ranks
from programs import program
from transformers import AutoConfig

pytestmark = pytest.mark.slow  # each Trainer takes seconds to start
STEPS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(trainer_runs.train, 2, folder, 2, STEPS, timeout=240)
    trainer_runs.add_small_files(folder / "checkpoint-2")
    return folder / "checkpoint-2"


def test_moved_to_one_rank(trained, tmp_path, capsys):
    target = tmp_path / "checkpoint-2"
    assert program("respread_checkpoint")(trained, target, "--world-size", 1) == 0
    printed = capsys.readouterr().out
    assert "carried over: config.json, generation_config.json" in printed
    assert "rng_state_0.pth (of another number of ranks)" in printed
    for name in ("config.json", "trainer_state.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (trained / name).read_bytes()
    ((log, layers),) = run_ranks(
        trainer_runs.train, 1, tmp_path / "out", 2, STEPS + 2, target, timeout=240
    )
    assert layers == 2
    before = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert log[: len(before)] == before
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]


def test_grown_to_four_layers(trained, tmp_path, capsys):
    target = tmp_path / "checkpoint-2"
    grow = program("grow_checkpoint")
    assert grow(trained, target, "--operator", "last", "--layers", 4) == 0
    assert "rng_state_0.pth, rng_state_1.pth" in capsys.readouterr().out  # the ranks are the same
    assert AutoConfig.from_pretrained(target).num_hidden_layers == 4
    found = run_ranks(trainer_runs.train, 2, tmp_path / "out", 4, STEPS + 2, target, timeout=240)
    for log, layers in found:
        assert layers == 4
        assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
