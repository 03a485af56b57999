"""The report of every state that a run can be in is a page."""

import pytest
from programs import program
from synthetic_run import SyntheticRun

from lag_megatron.report import report_data, write_report

report = program("report")


def not_begun(run):
    pass


def no_step(run):
    run.event("stage_started", stage=0, step=0, num_layers=4)


def no_validation(run):
    run.event("stage_started", stage=0, step=0, num_layers=4)
    where = {"step": 1, "tokens": 4096, "stage": 0}
    run.line(run.path / "metrics.jsonl", {**where, "train/loss": 8.0})


def only_validation(run):
    run.line(run.path / "metrics.jsonl", {"step": 0, "tokens": 0, "stage": 0, "val/loss": 8.3})


def pool_made(run):
    run.train(0)
    run.start_growth(1)


def first_probe_begun(run):
    first, *_ = grown(run)
    run.event("probe_started", growth=1, id=first.id)


def in_a_probe(run):
    first, *_ = grown(run)
    line = {"step": 0, "val_loss": 4.6, "val_loss_batches": [4.6, 4.6]}
    run.line(run.path / "growth01" / first.id / "probe.jsonl", line)


def grown(run):
    run.train(0)
    return run.start_growth(1)


def all_failed_at_step_0(run):
    for candidate in grown(run):
        known = {"growth": 1, "id": candidate.id, "step": 0}
        run.event("probe_failed", **known, reason="validation loss is nan at step 0")


def all_failed_later(run):
    for candidate in grown(run):
        run.probe(1, candidate.id, {0: 4.5, 10: 30.0}, ending="failed")


def all_failed_without_a_number(run):
    for candidate in grown(run):
        line = {"step": 0, "val_loss": float("nan"), "val_loss_batches": [float("nan")]}
        run.line(run.path / "growth01" / candidate.id / "probe.jsonl", line)
        known = {"growth": 1, "id": candidate.id, "step": 0}
        run.event("probe_failed", **known, reason="validation loss is nan at step 0")


def one_survivor(run):
    first, *others = grown(run)
    for candidate in others:
        known = {"growth": 1, "id": candidate.id, "step": 0}
        run.event("probe_failed", **known, reason="validation loss is nan at step 0")
    run.probe(1, first.id, {0: 4.5, 10: 4.4, 20: 4.35, 40: 4.3})


def one_survivor_decided(run):
    first, *others = grown(run)
    entries = [
        {"id": c.id, "status": "failed", "reason": "nan", "steps": 0, "curve": []} for c in others
    ]
    winner = run.probe(1, first.id, {0: 4.5, 10: 4.4, 20: 4.35, 40: 4.3})
    run.decide(1, [winner, *entries])


def survivor_before_its_lag(run):
    first, *_ = grown(run)
    run.probe(1, first.id, {0: 4.5, 10: 4.4}, ending="stopped")


def grown_and_finished(run):
    run.go_through()


STATES = [
    not_begun, no_step, no_validation, only_validation, pool_made, first_probe_begun, in_a_probe,
    all_failed_at_step_0, all_failed_later, all_failed_without_a_number, one_survivor,
    one_survivor_decided, survivor_before_its_lag, grown_and_finished,
]  # fmt: skip


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_report_is_a_page(state, tmp_path, capsys):
    run = SyntheticRun(tmp_path / "run")
    state(run)
    page = write_report(run.path)
    assert page.read_text().rstrip().endswith("</html>")
    assert (run.path / "report.md").read_text().startswith("# ")
    assert not list(run.path.rglob("*.part"))
    assert report(run.path, "--json") == 0
    assert report_data(run.path)["name"] in capsys.readouterr().out


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_rules_on_its_curves_are_an_answer_or_a_message(state, tmp_path, capsys):
    run = SyntheticRun(tmp_path / "run")
    state(run)
    for options in (["--rule", "lag"], ["--rule", "halving"], ["--record", tmp_path / "s.json"]):
        code = report(run.path, *options)
        printed = capsys.readouterr()
        assert code in (0, 2)
        assert printed.out if code == 0 else printed.err.count("\n") == 1
