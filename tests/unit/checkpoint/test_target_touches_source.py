"""Targets that are their source, lie in it or hold it: refused before anything is written."""

import json
import os
import shutil

import pytest
from converting import convert
from programs import grow, program

import lag_megatron as lag
from lag_megatron.errors import PlanError

evaluate, prepare, report = program("evaluate"), program("prepare_data"), program("report")


@pytest.fixture
def source(checkpoint, tmp_path):
    """The tag ``step3`` of a folder with ``latest``."""
    folder = tmp_path / "ck"
    shutil.copytree(checkpoint, folder / "step3")
    (folder / "latest").write_text("step3")
    (tmp_path / "link").symlink_to(folder / "step3")
    return folder / "step3"


def state_of(folder):
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(folder.rglob("*"))
    }


# Of each: what the user names, from the folder around ``ck``.
TOUCHING = {
    "the tag": "ck/step3",
    "inside": "ck/step3/new/deep",
    "through ..": "ck/step3/../step3/new",
    "through a link": "link/new",
    "the link": "link",
}
GROWN = ("--operator", "last", "--layers", 3)
PROGRAMS = {
    "grow": lambda s, t: grow(s, t, *GROWN),
    "dry": lambda s, t: grow(s, t, *GROWN, "--dry-run"),
    "respread": lambda s, t: grow(s, t, "--world-size", 1),
    **{
        form: lambda s, t, form=form: convert(s, t, "--to", form)
        for form in ("zero", "universal", "megatron", "hf")
    },
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("touching", TOUCHING)
def test_refused(name, touching, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = state_of(tmp_path)
    assert PROGRAMS[name](source, TOUCHING[touching]) == 2
    message = capsys.readouterr().err
    assert "which is never changed. Name a target outside of it; nothing was written." in message
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("name", ["grow", "respread", "zero"])
def test_the_folder_of_the_tag_would_be_written_over(name, source, tmp_path, capsys):
    before = state_of(tmp_path)
    assert PROGRAMS[name](source.parent, source.parent) == 2
    assert f"{source}: is what is read" in capsys.readouterr().err
    assert state_of(tmp_path) == before


def test_a_directory_around_the_source(source, tmp_path, capsys):
    assert convert(source, source.parent, "--to", "hf") == 2
    assert f"{source.parent}: holds what is read, {source}" in capsys.readouterr().err


def test_a_tag_beside_the_source(source):
    """A further tag, which ``latest`` names from then on, as after a save of DeepSpeed's."""
    own = source.rename(source.with_name("mine"))
    (own.parent / "latest").write_text("mine\n")
    before = state_of(own)
    assert convert(own, own.parent, "--to", "universal") == 0  # which has a pointer of its own
    assert (own.parent / "latest").read_text() == "mine\n"
    assert convert(own, own.parent, "--to", "zero") == 0
    assert (own.parent / "latest").read_text().strip() == "step00000003"
    assert state_of(own) == before


def test_linked_growth(source, tmp_path, capsys):
    assert convert(source, tmp_path / "u", "--to", "universal") == 0
    tag = tmp_path / "u" / "step3_universal"
    before = state_of(tmp_path)
    for target in (tmp_path / "u", tag, tag / "new"):
        assert grow(tag, target, "--link", *GROWN) == 2
        assert "which is never changed" in capsys.readouterr().err
    assert state_of(tmp_path) == before


def test_the_functions(source):
    for target in (source, source / "new"):
        with pytest.raises(PlanError, match="which is never changed"):
            lag.grow(source, target)
        with pytest.raises(PlanError, match="which is never changed"):
            lag.convert(source, target, to="hf")


def test_prepared_data_within_its_text(tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("once upon a time\n\n" * 50)
    os.symlink(text, tmp_path / "link")
    before = state_of(tmp_path)
    for output in (text, text / "out", tmp_path / "link" / "out"):
        given = ("--source", "text", "--paths", text, "--output", output)
        assert prepare(*given) == 2
        assert "which is never changed" in capsys.readouterr().err
    assert state_of(tmp_path) == before


def test_results_over_an_input(tmp_path, capsys):
    data = tmp_path / "lambada.jsonl"
    data.write_text('{"context": "a b", "continuation": "c"}\n' * 2)
    for file in (data, tmp_path / "config.json"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        before = file.read_text()
        given = ("--tasks", "lambada", "--data", tmp_path, "--output", file)
        assert evaluate(tmp_path, *given) == 2
        assert "holds no results of this program" in capsys.readouterr().err
        assert file.read_text() == before


def test_a_recorded_search_over_an_input(tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("{}\n")
    assert report(tmp_path, "--record", metrics) == 2
    assert "holds no recorded search" in capsys.readouterr().err
    assert metrics.read_text() == "{}\n"
