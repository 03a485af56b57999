"""Ids of special tokens in a model of transformers: what comes in goes out, or is refused."""

import json
import shutil

import pytest
from converting import convert, save_families

families = pytest.fixture(save_families, scope="module")

IDS = [
    {"pad_token_id": -1},
    {"pad_token_id": None, "eos_token_id": [1, 2]},
    {"bos_token_id": -1, "eos_token_id": -1, "pad_token_id": -1},
    {"eos_token_id": [-1], "pad_token_id": 0},
]


def with_ids(families, tmp_path, family, ids):
    folder = tmp_path / "source"
    shutil.copytree(families[family][1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **ids}))
    return folder


@pytest.mark.parametrize("ids", IDS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ids_go_out_as_they_came_in(ids, family, families, tmp_path, capsys):
    source = with_ids(families, tmp_path, family, ids)
    assert convert(source, tmp_path / "zero", "--to", "zero") == 0
    assert convert(tmp_path / "zero", tmp_path / "hf", "--to", "hf") == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: config.get(key) for key in ids} == ids
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation.get("pad_token_id", 0) in (None, 0)


@pytest.mark.parametrize("value", ["x", 1.5, True, [1, "x"], {}], ids=str)
@pytest.mark.parametrize("key", ["pad_token_id", "eos_token_id", "decoder_start_token_id"])
def test_what_is_no_id_is_refused(key, value, families, tmp_path, capsys):
    source = with_ids(families, tmp_path, "gpt2", {key: value})
    assert convert(source, tmp_path / "zero", "--to", "zero") == 2
    error = capsys.readouterr().err
    assert f"{source}" in error
    assert "config.json" in error
    assert key in error
    assert error.count("\n") == 1
    assert not (tmp_path / "zero").exists()
