"""A disk that is full while a run writes its small files: one message, and no half of a line."""

import contextlib
import gzip
import json
import resource

import pytest
from synthetic_run import SyntheticRun

from lag_megatron.distributed.rank_errors import attempt
from lag_megatron.errors import RunError
from lag_megatron.evaluation.candidates import SCORES_FILE
from lag_megatron.report import write_report, write_search
from lag_megatron.run.directory import RunDirectory, claim, write_json
from lag_megatron.run.journal import Journal
from lag_megatron.run.metrics import MetricsLog, read_rows
from lag_megatron.search.candidate_dir import CURVE, CandidateDir

FULL = "cannot be written: File too large. Free some space"


@contextlib.contextmanager
def file_size_limit(limit):
    """No file may grow beyond ``limit`` bytes: a longer write is cut short, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(path, limit, write):
    with file_size_limit(limit), pytest.raises(RunError) as refusal:
        write()
    assert str(refusal.value).startswith(f"{path}: {FULL}")


def test_a_metrics_line_is_there_or_not(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "train/loss": 4.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    rows = [{"step": n, "train/loss": 4.5} for n in range(2, 5)]
    refused(tmp_path / "metrics.jsonl", size + 40, lambda: log.append(*rows))
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    log.append(*rows)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_metrics_that_are_cut_stay_as_they_were(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(*({"step": n, "train/loss": 4.5} for n in range(9)))
    refused(tmp_path / "metrics.jsonl", 40, lambda: log.drop_after(5))
    assert len(log.rows()) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_journal_event_is_there_or_not(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("stage_started", stage=0)
    size = path.stat().st_size
    refused(path, size + 10, lambda: journal.append("stage_finished", stage=0))
    assert path.stat().st_size == size
    assert [e["event"] for e in journal.events] == ["stage_started"]
    assert [e["event"] for e in Journal(path).events] == ["stage_started"]


def test_a_line_of_a_probe_is_there_or_not(tmp_path):
    probe = CandidateDir(tmp_path, 10)
    probe.resume(rung=4)
    row = {"step": 0, "val_loss": 4.5}
    probe.add(CURVE, [row])
    refused(tmp_path / CURVE, 40, lambda: probe.add(CURVE, [row, row]))
    assert probe.curve() == [row]
    refused(tmp_path / "hung.jsonl", 4, lambda: probe.mark_hung(attempt=1, seconds=3.0))
    assert probe.failure() == ""


def test_facts_and_configuration_stay_as_they_were(tmp_path):
    run = SyntheticRun(tmp_path / "run")
    facts, config = (run.path / "run.json").read_text(), (run.path / "config.yaml").read_text()
    refused(run.path / "run.json", 20, lambda: write_json(run.path / "run.json", {"a": "b" * 99}))
    refused(run.path / "config.yaml", 20, lambda: claim(RunDirectory(run.path), run.config))
    assert (run.path / "run.json").read_text() == facts
    assert (run.path / "config.yaml").read_text() == config


@pytest.mark.parametrize("limit", [100, 30_000], ids=["figures", "pages"])
def test_an_earlier_report_stays_as_it_was(limit, tmp_path):
    run = SyntheticRun(tmp_path / "run")
    run.go_through()
    page = write_report(run.path)
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    run.event("run_started", world_size=2, resumed=True)
    with file_size_limit(limit), pytest.raises(RunError, match=FULL):
        write_report(run.path)
    assert page.read_bytes() == before[page]
    assert {p for p in run.path.rglob("*") if p.is_file()} == set(before)


def test_a_recorded_search_is_whole_or_not_there(tmp_path):
    run = SyntheticRun(tmp_path / "run")
    run.go_through()
    file = tmp_path / "search.json.gz"
    refused(file, 50, lambda: write_search(run.path, 1, file))
    assert not file.exists()
    write_search(run.path, 1, file)
    json.loads(gzip.decompress(file.read_bytes()))


def test_what_a_rank_cannot_write_is_a_message_on_all_ranks(tmp_path):
    """Whatever it was: a folder, a link, a file of a library."""

    def write():
        (tmp_path / SCORES_FILE).write_text("x" * 100)

    with file_size_limit(10):
        _, error = attempt(write)
    assert isinstance(error, RunError)
    assert FULL in str(error)
