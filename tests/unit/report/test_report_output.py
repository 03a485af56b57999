"""Where a report is written: beside the run, elsewhere, and not at all where nothing can be."""

import errno
import os
from pathlib import Path

import pytest
from programs import program
from synthetic_run import SyntheticRun

from lag_megatron.errors import RunError
from lag_megatron.report import write_report
from lag_megatron.run.directory import RunDirectory, acquire

report = program("report")


@pytest.fixture
def run(tmp_path):
    made = SyntheticRun(tmp_path / "archive" / "run")
    made.go_through()
    return made.path


@pytest.fixture
def read_only(run, monkeypatch):
    """As on a file system that is mounted so, where root may write as little as others."""
    access, path_open = os.access, Path.open

    def forbidden(path):
        return Path(path).resolve().is_relative_to(run.parent)

    def open_(path, mode="r", *given, **options):
        if forbidden(path) and set(mode) & set("wax+"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return path_open(path, mode, *given, **options)

    def accessible(path, mode):
        return not (mode & os.W_OK and forbidden(path)) and access(path, mode)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(os, "access", accessible)
    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_gets_all_of_it(run, tmp_path, capsys):
    before = names(run)
    out = tmp_path / "new" / "out"
    assert report(run, "--output", out) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    assert {"report.html", "report.md"} <= set(names(out))
    assert names(run) == before


def test_a_page_gets_its_name(run, tmp_path):
    assert report(run, "--output", tmp_path / "mine.html") == 0
    assert (tmp_path / "mine.html").read_text() == write_report(run).read_text()
    assert (tmp_path / "mine.md").is_file()


def test_a_read_only_run_is_told_and_has_a_way_out(read_only, tmp_path, capsys):
    assert report(read_only) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{read_only}/report.html: the report cannot be written there:")
    assert "--output" in error
    assert error.count("\n") == 1
    assert report(read_only, "--output", tmp_path / "out") == 0


def test_a_read_only_run_does_not_go_on(read_only):
    with pytest.raises(RunError, match=r"Read-only file system.*copy as --run-dir"):
        acquire(RunDirectory(read_only))


def test_an_output_that_cannot_be_is_refused_first(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lag_megatron.report.report_data", None)  # the work, which is not begun
    (tmp_path / "file").write_text("")
    assert report(run, "--output", tmp_path / "file" / "out") == 2
    assert "is not a folder" in capsys.readouterr().err
    assert report(run, "--output", tmp_path / "file") == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--json"], ["--rule", "lag"], ["--record", "x.json"]])
def test_an_output_without_a_report_is_refused(options, run, tmp_path, capsys):
    assert report(run, "--output", tmp_path / "out", *options) == 2
    assert "Leave it out" in capsys.readouterr().err


def test_a_record_is_tried_before_the_work(run, tmp_path, capsys):
    assert report(run, "--record", tmp_path) == 2
    assert "it is a folder" in capsys.readouterr().err
