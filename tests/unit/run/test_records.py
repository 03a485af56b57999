"""The journal, the metrics and the run directory."""

import multiprocessing
import os
import shutil

import pytest
from conftest import ROOT

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.config import load_config
from lag_megatron.errors import RunError
from lag_megatron.run import directory
from lag_megatron.run.journal import Journal
from lag_megatron.run.metrics import MetricsLog, read_rows


def test_a_journal_is_its_replay(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("stage_started", stage=0)
    journal.append("probe_finished", growth=1, id="a", state=None)
    journal.append("probe_finished", growth=1, id="b", state="x")
    again = Journal(path)
    assert again.events == journal.events
    assert again.find("probe_finished", growth=1)["id"] == "b"
    assert again.find("probe_finished", growth=1, id="a")["state"] is None
    assert again.find("decision", growth=1) is None


@pytest.mark.parametrize("torn", ['{"event": "dec', '{"event": "rung"}'])
def test_a_torn_last_line_never_happened(torn, tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).append("stage_started", stage=0)
    whole = path.read_text()
    path.write_text(whole + torn)
    journal = Journal(path)
    assert [e["event"] for e in journal.events] == ["stage_started"]
    assert path.read_text() == whole
    journal.append("growth_started", growth=1)
    assert [e["event"] for e in Journal(path).events] == ["stage_started", "growth_started"]


def test_a_broken_line_within_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "a"}\nnonsense\n{"event": "b"}\n')
    with pytest.raises(RunError, match=r"journal.jsonl:2"):
        Journal(path)


def test_metrics_after_a_step_are_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 0, "val/loss": 5.0}, {"step": 1, "train/loss": 4.0})
    log.append({"step": 2, "train/loss": 3.0}, {"step": 2, "val/loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train')
    log.drop_after(1)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]
    assert log.last("val/loss") == 5.0
    with pytest.raises(RunError, match=r"metrics\.jsonl: expected a line with nothing"):
        log.last("nothing")


def hold(path, started, release):
    with directory.acquire(directory.RunDirectory(path)):
        started.set()
        release.wait(20)


def test_a_run_directory_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "_LOCK_TIMEOUT_SECONDS", 0.2)
    context = multiprocessing.get_context("fork")
    started, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, started, release))
    holder.start()
    try:
        assert started.wait(10)
        with pytest.raises(RunError, match=f"pid {holder.pid}"):
            directory.acquire(directory.RunDirectory(tmp_path))
    finally:
        release.set()
        holder.join()
    directory.acquire(directory.RunDirectory(tmp_path)).close()


def test_what_may_differ_between_two_starts(tmp_path):
    run = directory.RunDirectory(tmp_path)
    demo = ROOT / "configs" / "demo.yaml"
    spread = ["parallel.zero_stage=2", "parallel.tensor=2", "parallel.micro_batch=4"]
    directory.claim(run, load_config(demo))
    directory.claim(run, load_config(demo, overrides=["checkpoint.interval=7", *spread]))
    assert load_config(tmp_path / "config.yaml").checkpoint.interval == 7
    for override in ("optimizer.lr=1.0", "data.seed=5", "growth.lag=0", "seed=3"):
        overrides = [override, *(["growth.rungs=[]"] if "lag" in override else [])]
        with pytest.raises(RunError, match=override.split("=")[0].replace(".", r"\.")):
            directory.claim(run, load_config(demo, overrides=overrides))


def test_tags_sort_by_step():
    steps = [0, 9, 10, 99_999_999]
    assert sorted(map(directory.tag_of, steps)) == list(map(directory.tag_of, steps))
    assert [directory.step_of(directory.tag_of(step)) for step in steps] == steps


def test_groups_and_time_limits_of_a_stage_may_change_between_starts(tmp_path):
    demo = ROOT / "configs" / "demo.yaml"

    def with_growth(growth):
        stages = f"stages=[{{steps: 500}}, {{steps: 100, num_layers: 6, growth: {growth}}}]"
        return load_config(demo, overrides=[stages])

    run = directory.RunDirectory(tmp_path)
    directory.claim(run, with_growth("{lag: 20, rungs: [], probe_groups: 8}"))
    directory.claim(run, with_growth("{lag: 20, rungs: [], probe_groups: auto, rung_timeout: 60}"))
    with pytest.raises(RunError, match=r"stages\.1\.growth\.lag"):
        directory.claim(run, with_growth("{lag: 30, rungs: [], probe_groups: 8}"))


def test_a_line_that_cannot_be_written_leaves_no_part_of_itself(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("run_started")

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left"):
            journal.append("checkpoint", path="x")
    journal.append("run_finished", step=1)
    names = [event["event"] for event in Journal(tmp_path / "journal.jsonl").events]
    assert names == ["run_started", "run_finished"]


def test_a_checkpoint_is_gone_at_once_even_where_its_files_are_not(tmp_path, monkeypatch):
    """As on NFS, where the files that a process still maps stay in the folder."""
    tag = tmp_path / "step00000004"
    tag.mkdir()
    (tag / "shard").write_text("x")
    (tag / manifest.MANIFEST).write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        manifest.remove_checkpoint(tag)
    assert not tag.exists()
    assert manifest.committed_tags(tmp_path) == []
    manifest.remove_checkpoint(tmp_path / "step00000008")
    assert list(tmp_path.iterdir()) == []
