"""The files that a Trainer keeps beside a tag: which follow it, when, and which are named."""

import json
import shutil

import pytest
from converting import convert
from programs import grow, program

from lag_megatron.checkpoint.writer import job

LAST = ("--operator", "last", "--layers", 3)
CARRIED = {
    "config.json": json.dumps({"model_type": "llama", "num_hidden_layers": 2}),
    "generation_config.json": "{}",
    "scheduler.pt": "a schedule",
    "tokenizer.json": "{}",
    "trainer_state.json": json.dumps({"global_step": 3}),
}
RANDOM = {f"rng_state_{rank}.pth": f"of rank {rank}" for rank in range(2)}
LEFT_OUT = {"training_args.bin": "arguments", "model.safetensors": "weights"}


@pytest.fixture
def folder(checkpoint, tmp_path):
    """As the Trainer writes it on 2 ranks."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint-3" / "step3")
    for name, text in {**CARRIED, **RANDOM, **LEFT_OUT, "latest": "step3"}.items():
        (tmp_path / "checkpoint-3" / name).write_text(text)
    return tmp_path / "checkpoint-3"


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_grown(folder, tmp_path, capsys):
    assert grow(folder, tmp_path / "out", *LAST) == 0
    found = texts(tmp_path / "out")
    assert json.loads(found.pop("config.json")) == {"model_type": "llama", "num_hidden_layers": 3}
    expected = CARRIED | RANDOM | {"latest": "step3"}
    del expected["config.json"]
    assert {name: found[name] for name in expected} == expected
    assert not set(found) & set(LEFT_OUT)
    lines = capsys.readouterr().out.splitlines()
    assert f"carried over: {', '.join(sorted(CARRIED | RANDOM))}" in lines
    weights = "model.safetensors (weights: lag-convert --to hf writes them)"
    assert f"not carried over: {weights}, training_args.bin" in lines


def test_moved_to_one_rank(folder, tmp_path, capsys):
    respread = program("respread_checkpoint")
    assert respread(folder, tmp_path / "out", "--world-size", 1) == 0
    found = texts(tmp_path / "out")
    assert {name: found[name] for name in CARRIED} == CARRIED
    assert not set(found) & set(RANDOM)
    assert "rng_state_1.pth (of another number of ranks)" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["zero", "universal"])
def test_converted(to, folder, tmp_path, capsys):
    assert convert(folder, tmp_path / "out", "--to", to, *LAST) == 0
    found = texts(tmp_path / "out")
    assert json.loads(found["config.json"])["num_hidden_layers"] == 3
    assert found["trainer_state.json"] == CARRIED["trainer_state.json"]
    assert "carried over: config.json" in capsys.readouterr().out


def test_a_configuration_of_unknown_depth_is_named(folder, tmp_path, capsys):
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "depth": 2}))
    assert grow(folder, tmp_path / "out", *LAST) == 0
    assert not (tmp_path / "out" / "config.json").exists()
    assert "config.json (it says no depth, the checkpoint has 2 layers)" in capsys.readouterr().out


def test_a_damaged_configuration_is_refused(folder, tmp_path, capsys):
    (folder / "config.json").write_text('{"num_hidden_layers": ')
    assert grow(folder, tmp_path / "out", *LAST) == 2
    assert f"{folder / 'config.json'}: expected settings" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_s_file_in_the_target_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").write_text('{"global_step": 9}')
    assert grow(folder, tmp_path / "out", *LAST) == 2
    assert "trainer_state.json: exists already with other content" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trainer_state.json"]


def test_killed_before_the_pointer(folder, tmp_path, monkeypatch):
    """The files are there before ``latest``; the same call writes what is missing."""

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(job.manifest, "point_latest", kill)
        with pytest.raises(Killed):
            grow(folder, tmp_path / "out", *LAST)
    assert set(CARRIED) <= set(texts(tmp_path / "out"))
    assert not (tmp_path / "out" / "latest").exists()
    (tmp_path / "out" / "trainer_state.json").unlink()  # as if it were killed a little earlier
    assert grow(folder, tmp_path / "out", *LAST) == 0
    assert texts(tmp_path / "out")["trainer_state.json"] == CARRIED["trainer_state.json"]
    assert texts(tmp_path / "out")["latest"] == "step3"
