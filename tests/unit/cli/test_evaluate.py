"""The tool that evaluates: a run, its candidates, what was exported, and what it refuses."""

import json
import shutil
from dataclasses import asdict

import pytest
import tokenizers
from conftest import pico_config, run_ranks, train_and_save
from evaluating import END, write_lines, write_tasks
from racing import race
from tokenizers import models, pre_tokenizers

from lag_megatron.checkpoint.hf.tokenizer import tokenizer_files
from lag_megatron.cli.evaluate import main
from lag_megatron.config import dump_config
from lag_megatron.errors import CheckpointError, DataError, RunError
from lag_megatron.evaluation.candidates import candidate_checkpoints
from lag_megatron.evaluation.export import find_checkpoint, find_tokenizer

data = pytest.fixture(write_tasks, scope="module")


def tool():
    return lambda *arguments: main([str(a) for a in arguments])


def save(config, folder):
    train_and_save(config, folder, client_state={"model": asdict(config.model)})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a checkpoint and the states of two candidates."""
    runs = tmp_path_factory.mktemp("runs")
    folder, config = runs / "pico", pico_config(seq_length=64)
    run_ranks(save, 1, config, folder / "stage00")
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "run.json").write_text(json.dumps({"data_digest": "abc"}))
    words = {END: 0} | {word: i for i, word in enumerate(["the", "dog", "ate", "bone"], 1)}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token=END))
    backend.add_special_tokens([END])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (runs / ".cache" / "data" / "abc").mkdir(parents=True)
    backend.save(str(runs / ".cache" / "data" / "abc" / "tokenizer.json"))
    for candidate in ("index0", "index1"):
        shutil.copytree(folder / "stage00" / "step3", folder / "growth01" / candidate / "step3")
    return folder


def test_the_tool_scores_a_run(run, data, tmp_path, capsys):
    out, kept = tmp_path / "out" / "scores.json", tmp_path / "hf"
    options = ["--data", data["lambada"].parent, "--tasks", "lambada,triviaqa"]
    assert tool()(run, *options, "--limit", 2, "--output", out, "--export-dir", kept) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["lambada", "acc"]
    results = json.loads(out.read_text())["results"]
    assert {task: result["items"] for task, result in results.items()} == {
        "lambada": 2,
        "triviaqa": 2,
    }
    assert 0 <= results["lambada"]["metrics"]["acc"]["value"] <= 1
    assert results["lambada"]["metrics"]["perplexity"]["value"] > 1
    capsys.readouterr()
    (tmp_path / "mine").mkdir()
    assert tool()(run, *options, "--export-dir", tmp_path / "mine") == 2
    assert "exists already" in capsys.readouterr().err
    assert tool()(kept, *options, "--limit", 2, "--output", out) == 0  # what was kept, again
    assert json.loads(out.read_text())["results"] == results


def test_an_export_without_tokenizer_takes_one(run, data, tmp_path, capsys):
    """As ``convert --to hf`` writes it without ``--tokenizer``."""
    options = ["--data", f"lambada={data['lambada']}", "--tasks", "lambada"]
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    assert tool()(run, *options, "--export-dir", whole) == 0
    scores = capsys.readouterr().out
    shutil.copytree(whole, bare)
    for file in tokenizer_files(bare):
        file.unlink()
    assert tool()(bare, *options) == 2
    assert "has no tokenizer. Name it with --tokenizer FILE" in capsys.readouterr().err
    tokenizer = run.parent / ".cache" / "data" / "abc" / "tokenizer.json"
    before = sorted(bare.iterdir())
    assert tool()(bare, *options, "--tokenizer", tokenizer) == 0
    assert capsys.readouterr().out == scores
    assert sorted(bare.iterdir()) == before
    assert tool()(whole, *options, "--tokenizer", tokenizer) == 2
    assert "with a tokenizer of its own" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["folder", "file/scores.json"])
def test_an_output_is_tried_before_the_work(name, run, data, tmp_path, capsys, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lag_megatron.cli.evaluate.export_to_transformers", None)
    options = ["--data", f"lambada={data['lambada']}", "--tasks", "lambada"]
    assert tool()(run, *options, "--output", tmp_path / name) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{tmp_path / name}: --output cannot be written there:")
    assert error.count("\n") == 1


def test_equal_items_leave_none_for_an_example(run, tmp_path, capsys):
    rows = [{"context": "The dog ate the", "continuation": "bone"}] * 3
    write_lines(tmp_path / "lambada.jsonl", rows)
    options = ["--data", f"lambada={tmp_path / 'lambada.jsonl'}", "--tasks", "lambada"]
    assert tool()(run, *options) == 2
    assert (
        "1 items that differ for the task lambada, expected at least 2" in capsys.readouterr().err
    )


def test_the_tool_scores_every_candidate_for_the_report(run, data, capsys):
    options = ["--data", f"lambada={data['lambada']}", "--tasks", "lambada"]
    assert tool()(run, "--candidates", *options) == 0
    assert "growth01/index1" in capsys.readouterr().out
    for candidate in ("index0", "index1"):
        scores = json.loads((run / "growth01" / candidate / "scores.json").read_text())
        assert list(scores) == ["lambada"]
        assert 0 <= scores["lambada"] <= 1


@pytest.mark.slow
def test_one_of_two_evaluations_writes(run, data, tmp_path):
    out, kept = tmp_path / "scores.json", tmp_path / "hf"
    options = ["--data", f"lambada={data['lambada']}", "--tasks", "lambada", "--limit", 2]

    def work():
        return tool()(run, *options, "--output", out, "--export-dir", kept)

    codes, printed = race([work, work], delays=(0, 0.05), folder=tmp_path)
    assert sorted(codes) == [0, 2], printed
    assert f"{out}: is being written by" in printed[codes.index(2)]
    assert list(json.loads(out.read_text())["results"]) == ["lambada"]
    assert not list(tmp_path.glob("*.lock"))


def test_what_cannot_be_evaluated_is_refused(run, tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "run.json").touch()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        find_checkpoint(tmp_path)
    with pytest.raises(RunError, match="no candidate's state was kept"):
        candidate_checkpoints(tmp_path)
    elsewhere = tmp_path / "step3"
    shutil.copytree(run / "stage00" / "step3", elsewhere)
    (tmp_path / "run.json").unlink()
    assert find_checkpoint(elsewhere) == elsewhere
    with pytest.raises(DataError, match=r"not in a run directory.*--tokenizer"):
        find_tokenizer(elsewhere, None)
    assert find_tokenizer(run / "stage00" / "step3", None).end_id == 0


def test_wrong_options_are_refused(run, data, capsys):
    assert tool()(run, "--data", data["lambada"].parent, "--tasks", "glue") == 2
    assert "'glue' is no task" in capsys.readouterr().err
    assert tool()(run, "--data", "nowhere") == 2
    assert "neither a folder nor TASK=FILE" in capsys.readouterr().err
    assert tool()(run, "--data", f"lambada={data['lambada']}") == 2
    assert "no file for the task triviaqa" in capsys.readouterr().err
