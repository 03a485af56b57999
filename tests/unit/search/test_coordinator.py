"""The coordinator against groups that train made-up losses: rules, kills, failures, many groups."""

import json
import math
import os
import random
import threading
import time

import pytest
from probing import BASE_STEP, Killed, SimulatedSearch, killer, loss_of

from lag_megatron.errors import RunError
from lag_megatron.search.candidate_dir import CandidateDir
from lag_megatron.selection import Evaluation, replay


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """These kills end no process and cut no power, so nothing has to reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def without_times(decision):
    cost = {k: v for k, v in decision["cost"].items() if "seconds" not in k}
    return {**decision, "cost": cost}


def events_of(search, name):
    lines = search.run.journal.read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == name]


RULES = {
    "lag": {"rule": "lag", "rungs": ()},
    "halving": {},
    "unguarded": {"min_rank_correlation": -1.0},
    "mean": {"rung_value": "mean"},
    "auto": {"lag": "auto", "rungs": (2, 4, 6, 10, 20)},
    "lag auto": {"rule": "lag", "lag": "auto", "rungs": (2, 4, 6, 10, 20)},
    "exhaustive": {"exhaustive": True, "eval_steps": (30, 50)},
}
QUICK = {("lag", 0), ("halving", 1), ("auto", 2), ("exhaustive", 3)}


@pytest.mark.parametrize("rule", RULES)
def test_a_live_event_does_what_its_replay_says(rule, tmp_path):
    search = SimulatedSearch(tmp_path, **RULES[rule])
    decision, state, rows = search.work()
    curves = {
        c.id: [Evaluation(step, loss_of(i, step)) for step in search.event.evaluations]
        for i, c in enumerate(search.event.pool)
    }
    replayed = replay(search.event.growth, curves, pool=list(curves))
    assert decision["chosen"] == replayed.chosen
    assert decision["lag"] == replayed.lag
    exhaustive = search.event.growth.exhaustive
    steps = 50 if exhaustive else replayed.steps[decision["chosen"]]
    assert state.name == f"step{BASE_STEP + steps:08d}"
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(101, 101 + steps))
    if not exhaustive:
        assert {c["id"]: c["steps"] for c in decision["candidates"]} == replayed.steps
        assert decision["cost"]["probe_steps"] == replayed.probe_steps == search.trained
        kept = {id_: tags for id_, tags in search.states().items() if tags}
        assert kept == {decision["chosen"]: [steps]}
    else:
        assert all(tags == [50] for tags in search.states().values())


@pytest.mark.parametrize(
    ("rule", "seed"),
    [
        pytest.param(rule, seed, marks=() if (rule, seed) in QUICK else pytest.mark.slow)
        for rule in RULES
        for seed in range(5)
    ],
)
def test_kills_anywhere_end_in_the_same_decision(rule, seed, tmp_path):
    undisturbed = SimulatedSearch(tmp_path / "undisturbed", **RULES[rule])
    expected, state, rows = undisturbed.work()
    search, rng = SimulatedSearch(tmp_path / "killed", **RULES[rule]), random.Random(seed)
    point, kills = killer(rng, 0.01), 0
    while True:
        try:
            decision, state_now, rows_now = search.work(point=point)
            break
        except Killed:
            kills += 1
    assert kills
    assert without_times(decision) == without_times(expected)
    assert rows_now == rows
    assert state_now.relative_to(search.run.root) == state.relative_to(undisturbed.run.root)
    # A kill costs what was trained since the last state.
    assert search.trained <= undisturbed.trained + 8 * kills
    for kind in ("probe_finished", "probe_stopped"):
        ids = [e["id"] for e in events_of(search, kind)]
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("rule", ["lag", "halving", "auto"])
def test_many_groups_decide_as_one(rule, tmp_path):
    alone = SimulatedSearch(tmp_path / "one", **RULES[rule])
    expected, *_ = alone.work()
    search = SimulatedSearch(tmp_path / "many", **RULES[rule])
    coordinator = search.coordinator()
    at_work, most, all_at_work = set(), [], threading.Barrier(3)

    def work(group):
        rng, held = random.Random(group), (None, 0)
        while True:
            assignment = coordinator.ask(group, held[0], stopped=lambda: "")
            if assignment.candidate is None:
                return
            time.sleep(rng.uniform(0, 0.02))
            assert assignment.candidate not in at_work, "two groups train one candidate"
            at_work.add(assignment.candidate)
            most.append(len(at_work))
            if held[0] is None:
                all_at_work.wait(30)  # nobody goes on before each has something to do
                most.append(len(at_work))
                all_at_work.wait(30)
            there = held[1] if held == (assignment.candidate, assignment.trained_steps) else None
            result = search.advance(assignment, coordinator.needs_checkpoint, held=there)
            at_work.remove(assignment.candidate)
            coordinator.record(group, result)
            held = (assignment.candidate, result.steps)

    threads = [threading.Thread(target=work, args=(group,)) for group in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    decision, _ = coordinator.decide()
    assert coordinator.announce(decision).is_dir()
    assert max(most) == 3
    assert search.trained == alone.trained
    assert without_times(decision) == without_times(expected)


def test_a_stop_reaches_a_group_that_waits_for_the_others(tmp_path):
    search = SimulatedSearch(tmp_path)
    coordinator = search.coordinator()
    for group in range(len(search.event.pool)):
        assert coordinator.ask(group, None, stopped=lambda: "").candidate == group
    stops = []
    coordinator.on_stop = stops.append
    waiting = threading.Thread(
        target=lambda: stops.append(coordinator.ask(99, None, stopped=lambda: "").stop)
    )
    waiting.start()
    coordinator.stop("received SIGTERM")
    waiting.join(10)
    assert stops == ["received SIGTERM"] * 2
    assert coordinator.ask(0, None, stopped=lambda: "").stop == "received SIGTERM"


def test_a_candidate_that_diverges_loses_wherever_it_does(tmp_path):
    def losses(index, step):
        return math.nan if (index, step) in {(2, 0), (3, 4), (5, 20)} else loss_of(index, step)

    decision, *_ = SimulatedSearch(tmp_path, losses=losses).work()
    reasons = {c["reason"] for c in decision["candidates"] if c["status"] == "failed"}
    assert {"validation loss is nan at step 0", "validation loss is nan at step 4"} <= reasons


def test_the_winner_may_fail_after_the_verdict_when_its_state_is_lost(tmp_path):
    search = SimulatedSearch(tmp_path / "first")
    chosen = search.work()[0]["chosen"]
    number = [c.id for c in search.event.pool].index(chosen)
    broken = False

    def losses(index, step):
        return math.nan if broken and index == number else loss_of(index, step)

    again = SimulatedSearch(tmp_path / "again", losses=losses)

    def point(name):
        if name == "decided":
            raise Killed

    with pytest.raises(Killed):
        again.work(point=point)
    CandidateDir(again.run.probe(1, chosen), BASE_STEP).keep_only(None)
    broken = True
    decision, state, _ = again.work()
    statuses = {c["id"]: c["status"] for c in decision["candidates"]}
    assert decision["chosen"] != chosen
    assert statuses[chosen] == "failed"
    assert state.parent.name == decision["chosen"]


@pytest.mark.parametrize("rule", ["lag", "halving", "auto"])
def test_a_winner_that_is_trained_again_stays_it_whatever_rounding_does(rule, tmp_path):
    shift = 0.0
    search = SimulatedSearch(
        tmp_path, losses=lambda index, step: loss_of(index, step) + shift, **RULES[rule]
    )

    def point(name):
        if name == "decided":
            raise Killed

    with pytest.raises(Killed):
        search.work(point=point)
    (chosen,) = (e["goes_on"][0] for e in events_of(search, "rung_decided") if e["decided"])
    for candidate in search.event.pool:
        CandidateDir(search.run.probe(1, candidate.id), BASE_STEP).keep_only(None)
    shift = 0.05
    decision, state, _ = search.work()
    assert decision["chosen"] == state.parent.name == chosen


@pytest.mark.parametrize("rule", ["lag", "auto", "exhaustive"])
def test_states_that_somebody_deleted_are_trained_again(rule, tmp_path):
    search = SimulatedSearch(tmp_path, **RULES[rule])

    def point(name):
        if name == "decided":
            raise Killed

    with pytest.raises(Killed):
        search.work(point=point)
    trained = search.trained
    for candidate in search.event.pool:
        CandidateDir(search.run.probe(1, candidate.id), BASE_STEP).keep_only(None)
    decision, state, _ = search.work()
    assert state.is_dir()
    assert search.trained > trained
    assert decision["chosen"] == state.parent.name


def test_words_left_by_processes_that_ended_are_failures(tmp_path):
    search = SimulatedSearch(tmp_path)
    first, second, third = (
        CandidateDir(search.run.probe(1, c.id), BASE_STEP) for c in search.event.pool[:3]
    )
    for candidate_dir in (first, second, third):
        candidate_dir.path.mkdir(parents=True)
    first.mark_failed("out of memory on rank 3: tried to allocate 20 GiB", rank=3)
    for _rank in range(2):
        second.mark_hung(attempt=1, seconds=30)  # two ranks of one attempt
    for attempt in (1, 2):
        third.mark_hung(attempt=attempt, seconds=30)
    decision, *_ = search.work()
    found = [(c["status"], c["reason"]) for c in decision["candidates"][:3]]
    assert found[0] == ("failed", "out of memory on rank 3: tried to allocate 20 GiB")
    assert found[1][0] != "failed"
    assert found[2] == ("failed", "no progress for 30 s in 2 attempts; see stacks/")


def test_an_event_without_survivors_names_every_reason(tmp_path):
    search = SimulatedSearch(tmp_path, losses=lambda index, step: math.nan)
    with pytest.raises(RunError, match="none of the 12 candidates"):
        search.work()
