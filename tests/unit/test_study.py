"""Studies: equal budgets against brute force, runs resumed and ended, numbers by hand, findings."""

import json
import math
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from lag_megatron.config import dump_config
from lag_megatron.errors import ConfigError, RunError
from lag_megatron.study import (
    StudyFolder,
    load_study,
    plan_study,
    prepare,
    run_all,
    write_study,
)
from lag_megatron.study.findings import findings
from lag_megatron.study.outcome import Point, read_outcome
from lag_megatron.study.results import flops_to_reach, study_results
from lag_megatron.study.statistics import estimate, paired

ROOT = Path(__file__).parents[2]
TOKENS = 8 * 32
BASE = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "seq_length": 32,
        "vocab_size": 384,
    },
    "data": {"validation_tokens": 1024},
    "optimizer": {"lr": 3e-3, "schedule": {"warmup_steps": 4}},
    "parallel": {"micro_batch": 2, "global_batch": 8},
    "stages": [{"steps": 10}],
    "growth": {"rule": "lag", "lag": 3, "rungs": [1, 3]},
}
GROWN = [{"steps": 10}, {"steps": 12, "num_layers": 3}]
LAST = {"pool": {"operator": "last"}}
ARMS = {
    "lag": {"stages": GROWN},
    "last": {"stages": [GROWN[0], {**GROWN[1], "growth": LAST}]},
    "scratch": {"model": {"num_layers": 3}, "stages": [{"steps": 10}]},
}
STUDY = {
    "base": "base.yaml",
    "seeds": [1, 2],
    "budget": {"of": "lag"},
    "reference": "scratch",
    "arms": ARMS,
    "learning_rates": {"constant": {}},
}


def a_step(layers: int) -> int:
    """Operations of a training step: 6 a weight and token, causal attention, the output layer."""
    weights = layers * (4 * 32 * 32 + 2 * 32 * 64) + 384 * 32
    return TOKENS * (6 * weights + 6 * layers * 32 * 32)


def write(folder: Path, base: dict | None = None, **changes: object) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump({**BASE, **(base or {})}))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    return path


def plan_of(folder: Path, base: dict | None = None, **changes: object):
    return plan_study(load_study(write(folder, base, **changes)))


def search_by_hand(candidates: int, steps: int, evaluations: int, *, kept: int = 3) -> int:
    """Of a growth to 3 layers; an evaluation of 4 batches is a third of as many steps."""
    return (candidates * steps - kept) * a_step(3) + evaluations * 4 * a_step(3) // 3


# Evaluated at 0, 1 and 3, by ema at 1 and 3 once more.
# The pool of 2 -> 3 layers: two places, one block size, two inits.
RULES = {
    "lag": ({}, search_by_hand(4, 3, 4 * 3)),
    "ema": ({"rung_value": "ema"}, search_by_hand(4, 3, 4 * (3 + 2))),
    # All 4 train 1 step and 2 of them 2 more; evaluations at 0, 1, 2 (0.8 of 3) and 3.
    "halving": ({"rule": "halving"}, search_by_hand(1, 4 + 2 * 2, 4 * 4)),
}


@pytest.mark.parametrize("rule", RULES)
def test_no_arm_is_planned_above_the_budget_nor_a_step_below(rule: str, tmp_path: Path) -> None:
    growth, search = RULES[rule]
    plan = plan_of(tmp_path, {"growth": {**BASE["growth"], **growth}})
    budget = 10 * a_step(2) + 12 * a_step(3) + search
    assert plan.budget == budget
    fixed = {"lag": 10 * a_step(2) + search, "last": 10 * a_step(2), "scratch": 0}
    for run in plan.runs:
        # Counted up one by one until the next step would cost too much.
        steps = 0
        while fixed[run.arm] + (steps + 1) * a_step(3) <= budget:
            steps += 1
        assert run.config.stages[-1].steps == steps
        assert run.cost.total == fixed[run.arm] + steps * a_step(3)
        assert run.cost.search == (search if run.arm == "lag" else 0)
    assert {r.config.stages[-1].steps for r in plan.runs if r.arm == "lag"} == {12}


def test_a_number_as_budget_seeds_and_names(tmp_path: Path) -> None:
    rates = {"constant": {}, "decayed": {"optimizer": {"schedule": {"name": "wsd"}}}}
    budget = {"flops": 100 * a_step(3) + 0.5}
    plan = plan_of(tmp_path, budget=budget, learning_rates=rates)
    scratch = [run for run in plan.runs if run.arm == "scratch"]
    assert {run.config.total_steps for run in scratch} == {100}
    assert [run.name for run in plan.runs][:3] == [
        "lag-constant-s1", "last-constant-s1", "scratch-constant-s1",
    ]  # fmt: skip
    assert {(run.seed, run.config.seed, run.config.data.seed) for run in plan.runs} == {
        (1, 1, 1),
        (2, 2, 2),
    }
    assert {run.config.optimizer.schedule.name for run in plan.runs} == {"constant", "wsd"}
    assert {run.config.tracking.wandb.mode for run in plan.runs} == {"disabled"}
    tracking = {"tracking": {"wandb": {"mode": "offline"}}}
    assert plan_of(tmp_path, tracking).runs[0].config.tracking.wandb.mode == "offline"


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    mistakes = {
        "seeds": [1, 1],
        "reference": "scrtch",
        "budget": {"of": "lag", "flops": 1.0},
        "arms": {"a-b": {"seed": 3}, "last": 5},
        "learning_rates": {"long": {"stages": []}},
    }
    with pytest.raises(ConfigError) as caught:
        load_study(write(tmp_path, **mistakes))
    for words in ("seeds: must differ", "arms.a-b: a name has", "arms.last: must be a mapping",
                  "arms.a-b: runs take the study's seeds", "learning_rates.long: holds settings",
                  "reference: must be one of the arms", "budget: give either of"):  # fmt: skip
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="Did you mean 'seeds'") as caught:
        load_study(write(tmp_path, seds=[1], budget={"off": "lag"}, launcher=3))
    assert "budget.off: unknown key" in str(caught.value)
    assert "launcher: must be a list of strings" in str(caught.value)


REFUSED = {
    "a key that is not there": ({"optimizer": {"lrr": 1.0}}, "lag-constant: optimizer.lrr"),
    "a growth that is impossible": ({"growth": LAST, "stages": [{"steps": 1}, {"steps": 9,
                                     "num_layers": 5}]}, "arms.lag: "),
    "other text": ({"data": {"validation_tokens": 2048}}, "arms.lag: data differs"),
    "an end of the decay": ({"optimizer": {"schedule": {"name": "cosine", "decay_steps": 30}}},
                            "decay_steps: must be null"),
    "a length that is measured": ({"stages": [{"steps": 9, "until_slope": -0.05}]},
                                  "until_slope: the run's cost is not known"),
    "all candidates to the end": ({"growth": {"exhaustive": True}}, "growth.exhaustive"),
    "ranks that are not there": ({"parallel": {"world_size": 2}}, "without a launcher"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_arms_that_cannot_be_compared_are_refused(why: str, tmp_path: Path) -> None:
    change, words = REFUSED[why]
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path, arms={**ARMS, "lag": {**ARMS["lag"], **change}})
    assert words in str(caught.value)


def test_arms_that_the_budget_does_not_reach_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path, budget={"flops": 10 * a_step(2) + 2 * a_step(3)})
    text = str(caught.value)
    assert "arms.lag: one step of the last stage" in text
    # Two steps are left for its last stage, but the winner's own are three.
    assert "arms.last, with the 2 steps that the budget leaves" in text
    assert "arms.scratch" not in text


FAKE = """
import json, signal, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run-dir") + 1])
run.mkdir(parents=True, exist_ok=True)
mode = Path(__file__).with_name("mode").read_text()
if mode == "wait":
    signal.signal(signal.SIGTERM, lambda *_: ((run / "saved").touch(), sys.exit(0)))
    (run / "ready").touch()
    time.sleep(60)
if mode == run.name:
    print("it broke here"); sys.exit(3)
with (run / "journal.jsonl").open("a") as file:
    file.write(json.dumps({"event": "run_finished"}) + "\\n")
"""


class Fake:
    """A study whose runs only write that they have finished, or fail, or wait to be ended."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.plan = plan_of(folder)
        self.folder = StudyFolder(folder / "out")
        self.script = folder / "fake.py"
        self.script.write_text(FAKE)
        (folder / "mode").write_text(mode)
        self.said: list[str] = []

    def run(self, workers: int = 2):
        left = prepare(self.plan, self.folder, workers=workers)
        return run_all(left, self.folder, script=self.script, launcher=(), workers=workers,
                       say=self.said.append)  # fmt: skip

    def started(self) -> list[str]:
        return [line.partition(":")[0] for line in self.said if line.endswith("started")]


def test_finished_runs_are_not_repeated_and_failed_ones_are(tmp_path: Path) -> None:
    study = Fake(tmp_path, "last-constant-s1")
    ended = study.run()
    assert study.started() == [run.name for run in study.plan.runs]
    assert [failure.run.name for failure in ended.failures] == ["last-constant-s1"]
    assert "exit code 3" in ended.failures[0].text
    assert "it broke here" in ended.failures[0].text
    written = (study.folder.root / "configs" / "lag-constant-s2.yaml").read_text()
    assert written == dump_config(study.plan.runs[3].config)

    again = Fake(tmp_path, "")
    assert again.run() == type(ended)(())
    assert again.started() == ["last-constant-s1"]
    assert Fake(tmp_path, "").run(1).failures == ()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_signal_reaches_the_runs_and_they_save(tmp_path: Path) -> None:
    study = Fake(tmp_path, "wait")
    ready = [study.folder.run(run).root / "ready" for run in study.plan.runs[:2]]

    def interrupt() -> None:
        wait_for(*ready)
        signal.raise_signal(signal.SIGINT)  # handled in the main thread

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    ended = study.run()
    thread.join()
    assert ended.signal == signal.SIGINT
    assert all(path.with_name("saved").exists() for path in ready)
    assert len(study.started()) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_no_run_stays_behind_when_the_terminal_is_gone(tmp_path: Path) -> None:
    study = Fake(tmp_path, "wait")
    first = study.folder.run(study.plan.runs[0]).root

    def say(text: str) -> None:
        if study.plan.runs[0].name not in text:
            wait_for(first / "ready")
            raise BrokenPipeError

    left = prepare(study.plan, study.folder, workers=2)
    with pytest.raises(BrokenPipeError):
        run_all(left, study.folder, script=study.script, launcher=(), workers=2, say=say)
    wait_for(first / "saved")
    assert (first / "saved").exists()


def test_a_launcher_that_cannot_work_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, launcher=["no_such_launcher", "{port}"])
    with pytest.raises(ConfigError, match="no_such_launcher"):
        prepare(plan, StudyFolder(tmp_path / "out"), workers=1)
    plan = plan_of(tmp_path, launcher=[sys.executable, "-u"])
    with pytest.raises(ConfigError, match="would meet at one port"):
        prepare(plan, StudyFolder(tmp_path / "out"), workers=2)
    assert not (tmp_path / "out").exists()


def test_intervals_are_those_of_scipys_t_tests() -> None:
    values = np.random.default_rng(0).normal(4.0, 0.1, size=(2, 4))
    found = estimate(list(values[0]))
    expected = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)
    ours, theirs = (dict(enumerate(row)) for row in values)
    found = paired({**ours, 7: 1.0}, {**theirs, 8: 1.0})
    expected = stats.ttest_rel(*values).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)
    assert found.count == 4
    assert found.holds_zero == (stats.ttest_rel(*values).pvalue > 0.05)
    assert estimate([2.5]).low is None
    assert estimate([2.5]).holds_zero is None
    assert estimate([]) is None


def test_reaching_a_loss_is_counted_after_the_search() -> None:
    def point(step: int, searches: int, loss: float, flops: float) -> Point:
        return Point(step=step, searches=searches, loss=loss, flops=flops, tokens=0, all_tokens=0,
                     seconds=0.0)  # fmt: skip

    curve = [point(0, 0, 6.0, 0.0), point(5, 0, 5.0, 10.0), point(5, 1, 5.0, 30.0),
             point(9, 1, 4.0, 40.0)]  # fmt: skip
    assert flops_to_reach(curve, 5.5) == 5.0
    assert flops_to_reach(curve, 5.0) == 10.0
    assert flops_to_reach(curve, 4.75) == 32.5
    assert flops_to_reach(curve, 3.9) is None
    assert flops_to_reach(curve, 6.0) == 0.0


SPEED = 512.0  # tokens a second: half a second a step


def record(run, folder: StudyFolder, final: float, *, finished: bool = True) -> Path:
    """A run directory by hand: losses fall in a straight line over steps from 6 to ``final``."""
    root, config = folder.run(run).root, run.config
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(dump_config(config))
    (root / "run.json").write_text(json.dumps({"vocab_size": 384}))
    total = config.total_steps
    rows = []
    for step in range(total + 1 if finished else 5):
        where = {"step": step, "tokens": step * TOKENS, "stage": int(step > 10)}
        if step:
            rows.append({**where, "train/loss": 1.0, "train/tokens_per_second": SPEED})
        if step % 5 == 0 or step == total:
            rows.append({**where, "val/loss": 6.0 + (final - 6.0) * step / total})
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [{"event": "run_started"}]
    if finished:
        events.append({"event": "run_finished", "step": total, "val_loss": final})
    (root / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if len(config.stages) > 1 and finished:
        record_growth(root / "growth01", names=["a"] if run.arm == "last" else ["a", "b", "c"])
    return root


def record_growth(folder: Path, names: list[str]) -> None:
    """Each of the candidates takes 3 steps, and they are evaluated twice."""
    folder.mkdir()
    (folder / "pool.json").write_text(json.dumps([{"id": name} for name in names]))
    steps, evaluations = 3 * len(names), 2 * len(names)
    cost = {
        "tokens": steps * TOKENS,
        "flops": steps * a_step(3) + evaluations * 4 * a_step(3) // 3,
        "seconds": 20.0,
    }
    candidates = [{"id": name, "steps": 3} for name in names]
    decision = {"chosen": "a", "candidates": candidates, "cost": cost}
    (folder / "decision.json").write_text(json.dumps(decision))


FINAL = {("lag", 1): 4.0, ("lag", 2): 4.2, ("last", 1): 4.4, ("last", 2): 4.5,
         ("scratch", 1): 4.5, ("scratch", 2): 4.68}  # fmt: skip


@pytest.fixture
def recorded(tmp_path: Path):
    plan = plan_of(tmp_path)
    folder = StudyFolder(tmp_path / "out")
    for run in plan.runs:
        record(run, folder, FINAL[run.arm, run.seed])
    return plan, folder


def test_costs_of_a_run_by_hand(recorded) -> None:
    plan, folder = recorded
    outcome = read_outcome(folder.run(plan.runs[0]).root)
    search = 6 * a_step(3) + 6 * 4 * a_step(3) // 3
    assert outcome.search_flops == search
    assert outcome.final_loss == 4.0
    places = [(point.step, point.searches) for point in outcome.curve]
    assert places == [(0, 0), (5, 0), (10, 0), (10, 1), (15, 1), (20, 1), (22, 1)]
    before, after = outcome.curve[2], outcome.curve[3]
    assert before.flops == 10 * a_step(2)
    assert after.flops == 10 * a_step(2) + search
    assert after.loss == before.loss
    assert (before.all_tokens, after.all_tokens) == (10 * TOKENS, 16 * TOKENS)
    # The winner's three steps of half a second are the run's own.
    assert (before.seconds, after.seconds) == pytest.approx((5.0, 5.0 + 20.0 - 1.5))
    end = outcome.end
    assert end.flops == 10 * a_step(2) + 12 * a_step(3) + search
    assert (end.tokens, end.all_tokens) == (22 * TOKENS, 28 * TOKENS)
    assert end.seconds == pytest.approx(11.0 + 18.5)
    last = read_outcome(folder.run(plan.runs[1]).root)
    assert last.search_flops == 0
    assert last.end.tokens == last.end.all_tokens


def test_results_and_what_they_say(recorded) -> None:
    plan, folder = recorded
    results = study_results(plan, folder)
    assert not results["missing"]
    arms = {arm["arm"]: arm for arm in results["arms"]}
    lag, scratch = np.array([4.0, 4.2]), np.array([4.5, 4.68])
    low, high = stats.ttest_rel(lag, scratch).confidence_interval(0.95)
    found = arms["lag"]["against_reference"]
    np.testing.assert_allclose((found["low"], found["high"]), (low, high), rtol=1e-9)
    assert not found["holds_zero"]
    assert arms["last"]["against_reference"]["holds_zero"]
    assert arms["scratch"]["against_reference"] is None
    assert arms["lag"]["curve"][-1]["loss"] == pytest.approx(4.1)
    reached = [
        flops_to_reach(read_outcome(folder.run(run).root).curve, FINAL["scratch", run.seed])
        for run in plan.runs
        if run.arm == "lag"
    ]
    assert arms["lag"]["to_reference"]["flops"] == pytest.approx(np.mean(reached))
    total = plan.runs[2].config.total_steps * a_step(3)
    saving = 1 - np.mean(reached) / total
    assert arms["lag"]["to_reference"]["saving"]["mean"] == pytest.approx(saving)
    [best] = results["best_against_last"]
    assert best["best"] == "lag"
    assert best["difference"]["mean"] == pytest.approx(-0.35)

    said = " ".join(findings(results))
    assert "With constant, lag against scratch: the final losses differ by -0.4900" in said
    assert "The first is lower at equal FLOPs" in said
    assert "last against scratch: the final losses differ by -0.1400" in said
    assert "The interval holds 0: no difference shown." in said
    # The recorded searches are of three candidates, the plan's of four.
    assert "lag with constant took" in said
    assert "fewer FLOPs than planned" in said


def test_the_report_is_made_of_what_is_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds=[1])
    folder = StudyFolder(tmp_path / "out")
    write_study(plan, folder)
    empty = (folder.root / "report.md").read_text()
    assert "3 of 3 runs are missing here" in empty
    assert "so there is nothing to draw" in empty

    lag, last, scratch = plan.runs
    record(lag, folder, 4.0)
    record(last, folder, 4.4, finished=False)
    record(scratch, folder, 4.5)
    page = write_study(plan, folder)
    text = (folder.root / "report.md").read_text()
    assert "last-constant-s1 (not finished: step 4 of 47)" in text.replace("\\_", "_")
    assert "There is one seed, so there are no intervals" in text
    assert "±" not in text
    assert "one pair cannot show a difference" in text
    names = {path.stem for path in (folder.root / "figures").iterdir()}
    axes = ("flops", "tokens", "all_tokens", "seconds")
    assert names == {"differences", *(f"{axis}-constant" for axis in axes)}
    assert page.read_text().count("data:image/png") == len(names)
    results = json.loads((folder.root / "results.json").read_text())
    assert list(results["missing"]) == ["last-constant-s1"]
    assert len(results["runs"]) == 3


def test_runs_of_another_study_are_not_taken_for_this_one(tmp_path: Path, recorded) -> None:
    _, folder = recorded
    other = plan_of(tmp_path, {"optimizer": {"lr": 1e-3}})
    with pytest.raises(RunError, match=r"lag-constant-s1: .*optimizer.lr.*another --out"):
        prepare(other, folder, workers=1)
    assert len(study_results(other, folder)["missing"]) == len(other.runs)


def test_a_gain_that_goes_with_the_decay_is_told(recorded) -> None:
    results = study_results(*recorded)
    [lag] = [arm for arm in results["arms"] if arm["arm"] == "lag"]
    lost = {**lag["against_reference"], "low": -0.1, "high": 0.1, "mean": 0.0, "holds_zero": True}
    results["arms"].append({**lag, "learning_rate": "decayed", "against_reference": lost})
    told = "The gain of lag over scratch is shown with constant, but not with decayed."
    assert told in findings(results)


def test_the_shipped_studies_hold() -> None:
    paths = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
    assert paths
    for path in paths:
        plan = plan_study(load_study(path))
        for run in plan.runs:
            last = len(run.config.stages) - 1
            shorter = run.cost.training - run.cost.training // run.config.stages[last].steps
            assert run.cost.total <= plan.budget < run.cost.total + (run.cost.training - shorter)
            assert math.isfinite(run.cost.search)
