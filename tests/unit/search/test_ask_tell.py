"""Searches by ask and tell with made-up losses: the live search's decision, errors, workers."""

import json
import math
import os
import random
import threading

import pytest
from asking import (
    BASE_STEP,
    RULE,
    batches_of,
    begin,
    candidates,
    decision_of,
    journal_of,
    make_base,
    save,
    states_in,
    train,
    work,
)
from probing import Killed, SimulatedSearch, killer

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import CheckpointError, ConfigError, RunError
from lag_megatron.report import report_data
from lag_megatron.search.ask_tell import search_directory, trial_store
from lag_megatron.search.ask_tell.search import Halving, Lag, Search, pool

RULES = {
    "lag": Lag(lag=20),
    "halving": RULE,
    "unguarded": Halving(lag=20, rungs=(5, 10, 20), min_rank_correlation=-1.0),
    "last": Halving(lag=20, rungs=(5, 10, 20), rung_value="last"),
    "auto": Halving(lag="auto", rungs=(2, 4, 6, 10, 20)),
    "lag auto": Lag(lag="auto", rungs=(2, 4, 6, 10, 20)),
    "right after growth": Lag(lag=0),
}


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """These kills end no process and cut no power, so nothing has to reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


def first(search):
    """The first trial, trained and saved."""
    trial = search.ask()
    losses, _ = train(trial)
    save(trial)
    return trial, losses


@pytest.mark.parametrize("rule", RULES)
def test_it_decides_as_the_live_search_does(rule, base, tmp_path):
    settings = {k: v for k, v in vars_of(RULES[rule].settings()).items() if k != "pool"}
    stand = SimulatedSearch(tmp_path / "live", **settings)
    _, state, rows = stand.work()
    search = begin(tmp_path / "asked", base, rule=RULES[rule], base_val_loss=6.0, costs=stand.costs)
    work(search)
    assert decision_of(tmp_path / "asked") == decision_of(tmp_path / "live")
    assert search.best.state == tmp_path / "asked" / state.relative_to(tmp_path / "live")
    assert states_in(tmp_path / "asked") == states_in(tmp_path / "live")
    there = manifest.check_sizes(search.best.state)
    assert there["step"] == BASE_STEP + search.best.steps
    training = search.best.state.parent / "train.jsonl"
    assert [json.loads(line)["step"] for line in training.read_text().splitlines()] == [
        row["step"] for row in rows if "train/loss" in row
    ]


def vars_of(settings):
    return {name: getattr(settings, name) for name in settings.__slots__}


def test_what_it_asks_for(base, tmp_path):
    search = begin(tmp_path / "search", base)
    trial = search.ask()
    assert (trial.is_first, trial.state, trial.plan) == (True, base, candidates()[0].plan)
    assert (trial.first_step, trial.last_step) == (0, 5)
    assert trial.evaluate_at == (0, 4, 5)
    assert trial.needs_state
    assert trial.save_dir.is_dir()
    later = []
    losses, _ = train(trial)
    save(trial)
    search.tell(trial, losses)
    while (trial := search.ask()) is not None:
        later.append(trial)
        losses, _ = train(trial)
        save(trial)
        search.tell(trial, losses)
    second = next(trial for trial in later if not trial.is_first)
    assert (second.first_step, second.last_step, second.evaluate_at) == (5, 10, (8, 10))
    assert second.state.name == f"step{BASE_STEP + 5:08d}"
    assert search.best.plan == next(c.plan for c in candidates() if c.id == search.best.id)
    assert search.ask() is None


@pytest.mark.parametrize("rule", ["lag", "halving", "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_kills_anywhere_end_in_the_same_decision(rule, seed, base, tmp_path, monkeypatch):
    """Between the calls, and within them at each write to the journal."""
    work(begin(tmp_path / "undisturbed", base, rule=RULES[rule]))
    point, kills = killer(random.Random(seed), 0.02), 0
    record = trial_store.Coordinator.record
    commit = trial_store.commit_state

    def killed_record(self, group, result):
        point("journal to be written")
        record(self, group, result)
        point("journal written")

    def killed_commit(*arguments, **named):
        point("state to be committed")
        commit(*arguments, **named)

    monkeypatch.setattr(trial_store.Coordinator, "record", killed_record)
    monkeypatch.setattr(trial_store, "commit_state", killed_commit)
    while True:
        search = begin(tmp_path / "killed", base, rule=RULES[rule])
        try:
            work(search, point=point)
            break
        except Killed:
            kills += 1
            search.close()
    assert kills
    assert decision_of(tmp_path / "killed") == decision_of(tmp_path / "undisturbed")
    assert states_in(tmp_path / "killed") == states_in(tmp_path / "undisturbed")


def test_a_killed_worker_gets_the_same_trial_again(base, tmp_path):
    search = begin(tmp_path / "search", base)
    trial, losses = first(search)
    search.tell(trial, losses)
    trial = search.ask()
    train(trial)
    (trial.save_dir / "half").write_text("a part of a state")
    search.close()
    again = begin(tmp_path / "search", base).ask()
    assert again.id == trial.id
    assert again.attempt == 2
    assert (again.first_step, again.last_step) == (trial.first_step, trial.last_step)
    assert not list(again.save_dir.iterdir())


def test_a_worker_that_asks_twice_gets_the_same_trial(base, tmp_path):
    search = begin(tmp_path / "search", base)
    before, now = search.ask(), search.ask()
    assert (before.id, before.last_step) == (now.id, now.last_step)
    losses, _ = train(now)
    save(now)
    with pytest.raises(RunError, match="not open"):
        search.tell(before, losses)
    search.tell(now, losses)
    with pytest.raises(RunError, match="not open"):
        search.tell(now, losses)


WRONG = {
    "not asked": (lambda losses: {**losses, 3: 4.0}, r"steps \[3\], which were not asked for"),
    "missing": (lambda losses: {0: losses[0]}, r"no validation loss at \[4, 5\]"),
    "none": (lambda losses: {}, r"no validation loss at \[0, 4, 5\]"),
    "no number": (lambda losses: {**losses, 5: "low"}, "neither a loss nor a list of losses"),
    "empty": (lambda losses: {**losses, 5: []}, "neither a loss nor a list of losses"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_losses_are_one_error_and_nothing_is_recorded(wrong, base, tmp_path):
    search = begin(tmp_path / "search", base)
    trial, losses = first(search)
    before = journal_of(tmp_path / "search")
    change, message = WRONG[wrong]
    with pytest.raises(RunError, match=message):
        search.tell(trial, change(losses))
    assert journal_of(tmp_path / "search") == before
    search.tell(trial, losses)


def test_training_losses_of_other_steps_are_refused(base, tmp_path):
    search = begin(tmp_path / "search", base)
    trial, losses = first(search)
    with pytest.raises(RunError, match="train_losses has steps"):
        search.tell(trial, losses, train_losses={0: 1.0, 6: 1.0})


def test_a_missing_state_is_an_error_where_the_candidate_can_still_win(base, tmp_path):
    search = begin(tmp_path / "search", base)
    trial = search.ask()
    losses, _ = train(trial)
    before = journal_of(tmp_path / "search")
    with pytest.raises(RunError, match="no state in"):
        search.tell(trial, losses)
    assert journal_of(tmp_path / "search") == before
    save(trial)
    search.tell(trial, losses)


def test_states_of_candidates_that_have_just_lost_need_not_be_saved(base, tmp_path):
    work(begin(tmp_path / "all", base, rule=Lag(lag=20)))
    search = begin(tmp_path / "few", base, rule=Lag(lag=20))
    saved = []
    while (trial := search.ask()) is not None:
        losses, training = train(trial)
        if search.needs_state(trial, losses):
            saved.append(trial.id)
            save(trial)
        search.tell(trial, losses, train_losses=training)
        assert len(states_in(tmp_path / "few")) <= 1
    assert len(saved) < len(candidates())
    assert decision_of(tmp_path / "few") == decision_of(tmp_path / "all")


def test_all_candidates_are_evaluated_on_the_same_batches(base, tmp_path):
    search = begin(tmp_path / "search", base)
    trial, losses = first(search)
    search.tell(trial, losses)
    trial, losses = first(search)
    with pytest.raises(RunError, match=r"of 3 batches, but .* has 2 there"):
        search.tell(trial, {step: [*batches, 4.0] for step, batches in losses.items()})
    search.tell(trial, losses)


def test_losses_may_be_numbers_arrays_or_tensors(base, tmp_path):
    import numpy as np
    import torch

    work(begin(tmp_path / "lists", base))
    search = begin(tmp_path / "arrays", base)
    while (trial := search.ask()) is not None:
        losses, training = train(trial)
        save(trial)
        kind = np.asarray if trial.index % 2 else lambda v: torch.tensor(v, dtype=torch.float64)
        search.tell(
            trial,
            {step: kind(values) for step, values in losses.items()},
            train_losses={step: torch.tensor(value) for step, value in training.items()},
        )
    assert decision_of(tmp_path / "arrays") == decision_of(tmp_path / "lists")


def test_ties_need_the_losses_of_the_batches(base, tmp_path):
    means = begin(tmp_path / "means", base)
    while (trial := means.ask()) is not None:
        losses, _ = train(trial)
        save(trial)
        means.tell(trial, {step: sum(values) / 2 for step, values in losses.items()})
    batches = work(begin(tmp_path / "batches", base))
    assert means.best.id == batches.best.id
    assert not means.best.ties
    assert decision_of(tmp_path / "batches")["ties"] == list(batches.best.ties)


FAILURES = {
    "nan": ({4: math.nan}, {}, "", "validation loss is nan at step 4", 4),
    "large": ({5: [19.0, 23.0]}, {}, "", "validation loss 21 is above growth.max_loss 20.0", 5),
    "training": ({}, {2: math.inf}, "", "training loss is inf at step 2", 2),
    "said": ({}, {}, "out of memory", "out of memory", 0),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_trial_has_lost_with_its_reason(kind, base, tmp_path):
    losses, training, failed, reason, steps = FAILURES[kind]
    search = begin(tmp_path / "search", base)
    trial = search.ask()
    measured = {0: batches_of(trial.index, 0)} if losses else {}
    search.tell(trial, {**measured, **losses}, train_losses=training, failed=failed)
    assert not states_in(tmp_path / "search")
    work(search)
    decision = decision_of(tmp_path / "search")
    (entry,) = (c for c in decision["candidates"] if c["id"] == trial.id)
    assert entry["status"] == "failed"
    assert entry["reason"].startswith(reason)
    assert entry["steps"] == steps
    assert search.best.id != trial.id


def test_a_search_whose_candidates_have_all_failed_says_so(base, tmp_path):
    search = begin(tmp_path / "search", base)
    for candidate in candidates():
        trial = search.ask()
        assert trial.id == candidate.id
        search.tell(trial, failed="out of memory")
    for _ in range(2):
        with pytest.raises(RunError, match=r"none of the .* candidates is left"):
            search.ask()
    with pytest.raises(RunError, match="not decided yet"):
        _ = search.best


def test_a_state_that_was_deleted_is_trained_again_from_the_base(base, tmp_path):
    expected = work(begin(tmp_path / "undisturbed", base)).best
    search = begin(tmp_path / "search", base)
    while (trial := search.ask()).is_first:
        losses, training = train(trial)
        save(trial)
        search.tell(trial, losses, train_losses=training)
    manifest.remove_checkpoint(trial.state)
    again = search.ask()
    assert (again.id, again.is_first, again.state) == (trial.id, True, base)
    assert (again.first_step, again.last_step) == (0, trial.last_step)
    assert again.evaluate_at == (0, 4, 5, 8, 10)
    work(search)
    assert search.best.id == expected.id
    assert decision_of(tmp_path / "search") == decision_of(tmp_path / "undisturbed")


def test_a_winner_whose_state_was_deleted_is_trained_again(base, tmp_path):
    expected = work(begin(tmp_path / "undisturbed", base)).best
    search = begin(tmp_path / "search", base)
    trials = []
    while not (told := [t for t in trials if (t.id, t.last_step) == (expected.id, 20)]):
        trials.append(search.ask())
        losses, training = train(trials[-1])
        save(trials[-1])
        search.tell(trials[-1], losses, train_losses=training)
    manifest.remove_checkpoint(told[0].save_dir.with_suffix(""))
    work(search, exact=True)
    assert search.best.id == expected.id
    assert search.best.state.is_dir()
    assert decision_of(tmp_path / "search")["chosen"] == expected.id


@pytest.mark.parametrize("rule", ["lag", "halving"])
def test_threads_share_the_trials(rule, base, tmp_path):
    work(begin(tmp_path / "one", base, rule=RULES[rule]))
    search = begin(tmp_path / "many", base, rule=RULES[rule])
    all_at_work, failures = threading.Barrier(3), []

    def run(worker):
        waited = []

        def point(name):
            if name == "asked" and not waited:
                waited.append(all_at_work.wait(30))  # nobody goes on before each has a trial

        try:
            work(search, worker=worker, point=point)
        except Exception as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert decision_of(tmp_path / "many") == decision_of(tmp_path / "one")
    workers = {e["group"] for e in journal_of(tmp_path / "many") if e["event"] == "probe_started"}
    assert workers == {0, 1, 2}


def test_two_searches_cannot_be_one_worker(base, tmp_path, monkeypatch):
    monkeypatch.setattr(search_directory, "_WORKER_TIMEOUT_SECONDS", 0.1)
    search, other = begin(tmp_path / "search", base), begin(tmp_path / "search", base)
    assert search.ask().id != other.ask(worker=1).id
    with pytest.raises(RunError, match=rf"\(pid {os.getpid()} on .* is worker 0"):
        other.ask()


def test_the_trial_of_a_worker_that_is_gone_is_taken_over(base, tmp_path):
    search, other = begin(tmp_path / "search", base), begin(tmp_path / "search", base)
    trial = search.ask(worker=0)
    search.close()
    assert other.ask(worker=1).id == trial.id
    losses, _ = train(trial)
    with pytest.raises(RunError, match="not open"):
        search.tell(trial, losses)


def test_a_directory_belongs_to_one_search(base, tmp_path):
    begin(tmp_path / "search", base)
    with pytest.raises(RunError, match=r"growth.lag \(20 there, 40 now\)"):
        begin(tmp_path / "search", base, rule=Lag(lag=40))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(RunError, match="holds a training run"):
        begin(tmp_path / "run", base)


def test_a_search_whose_settings_are_lost_is_not_taken_over(base, tmp_path):
    begin(tmp_path / "search", base).close()
    (tmp_path / "search" / "search.json").unlink()
    before = (tmp_path / "search" / "journal.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"search\.json: missing, but journal\.jsonl says that a"):
        begin(tmp_path / "search", base)
    assert not (tmp_path / "search" / "search.json").exists()
    assert (tmp_path / "search" / "journal.jsonl").read_bytes() == before


def test_wrong_settings_are_named(base, tmp_path):
    with pytest.raises(ConfigError, match="the last rung 5 must be the lag 20"):
        begin(tmp_path / "search", base, rule=Halving(lag=20, rungs=(2, 5)))
    with pytest.raises(ConfigError, match="lag: must be"):
        begin(tmp_path / "search", base, rule=Halving(lag="soon"))
    with pytest.raises(ConfigError, match="rung_value"):
        begin(tmp_path / "search", base, rule=Halving(lag=20, rung_value="ema"))
    with pytest.raises(ConfigError, match="at least one of duplicate, random"):
        pool(4, 6, init=())
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        begin(tmp_path / "search", tmp_path / "nothing")
    with pytest.raises(RunError, match="pool: candidates"):
        Search(tmp_path / "search", base=base, pool=[], rule=RULE)
    assert not (tmp_path / "search" / "journal.jsonl").exists()


def test_the_report_is_a_runs_growth_section(base, tmp_path):
    search = begin(tmp_path / "search", base)
    trial, losses = first(search)
    search.tell(trial, losses)
    assert search.report() == tmp_path / "search" / "report.html"
    assert "undecided" in (tmp_path / "search" / "report.md").read_text()
    work(search)
    shown = search.report().read_text()
    assert search.best.id in shown
    assert str(base) in shown
    data = report_data(tmp_path / "search")
    assert data["growth"][0]["chosen"] == search.best.id
    assert data["growth"][0]["step"] == BASE_STEP
    assert [len(model["layers"]) for model in data["lineage"]] == [4, 6]


def test_costs_that_are_not_known_are_not_made_up(base, tmp_path):
    work(begin(tmp_path / "search", base))
    decision = decision_of(tmp_path / "search")
    assert decision["cost"]["tokens"] is None
    assert decision["cost"]["flops"] is None
    assert decision["base_val_loss"] is None
    assert decision["cost"]["probe_steps"] == sum(c["steps"] for c in decision["candidates"])


def test_losses_of_the_guard_and_the_rungs_are_asked_for_once(base, tmp_path):
    asked = {}
    search = begin(tmp_path / "search", base)
    while (trial := search.ask()) is not None:
        asked.setdefault(trial.id, []).extend(trial.evaluate_at)
        losses, _ = train(trial)
        save(trial)
        search.tell(trial, losses)
    assert asked[search.best.id] == list(RULE.settings().evaluation_steps())
