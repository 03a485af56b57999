"""Results of studies: costs and differences by hand, intervals by scipy, findings, the report."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from studying import TOKENS, a_step, plan_of

from lag_megatron.config import dump_config
from lag_megatron.errors import RunError
from lag_megatron.study import StudyFolder, prepare_study, write_study
from lag_megatron.study.findings import finding_sentences
from lag_megatron.study.intervals import mean_interval, paired_difference
from lag_megatron.study.outcome import CurvePoint, read_outcome
from lag_megatron.study.results import flops_to_reach, study_results


def test_intervals_are_those_of_scipys_t_tests() -> None:
    values = np.random.default_rng(0).normal(4.0, 0.1, size=(2, 4))
    found = mean_interval(list(values[0]))
    expected = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)
    ours, theirs = (dict(enumerate(row)) for row in values)
    found = paired_difference({**ours, 7: 1.0}, {**theirs, 8: 1.0})
    expected = stats.ttest_rel(*values).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)
    assert found.count == 4
    assert found.holds_zero == (stats.ttest_rel(*values).pvalue > 0.05)
    assert mean_interval([2.5]).low is None
    assert mean_interval([2.5]).holds_zero is None
    assert mean_interval([]) is None


def test_reaching_a_loss_is_counted_after_the_search() -> None:
    def point(step: int, searches: int, loss: float, flops: float) -> CurvePoint:
        return CurvePoint(step=step, searches=searches, loss=loss, flops=flops, tokens=0,
                          all_tokens=0, seconds=0.0)  # fmt: skip

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
    layer = {"source": 0, "new": False, "init": "duplicate"}
    entry = {"source_layers": 1, "target_layers": 1, "layer_map": [layer]}
    (folder / "pool.json").write_text(json.dumps([{"id": name, **entry} for name in names]))
    steps, evaluations = 3 * len(names), 2 * len(names)
    cost = {
        "tokens": steps * TOKENS,
        "flops": steps * a_step(3) + evaluations * 4 * a_step(3) // 3,
        "seconds": 20.0,
    }
    ended = {"status": "finished", "steps": 3, "curve": [[0, 4.5], [3, 4.4]]}
    candidates = [{"id": name, **ended} for name in names]
    decision = {"lag": 3, "chosen": "a", "candidates": candidates, "cost": cost}
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

    said = " ".join(finding_sentences(results))
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
        prepare_study(other, folder, workers=1)
    assert len(study_results(other, folder)["missing"]) == len(other.runs)


def test_a_gain_that_goes_with_the_decay_is_told(recorded) -> None:
    results = study_results(*recorded)
    [lag] = [arm for arm in results["arms"] if arm["arm"] == "lag"]
    lost = {**lag["against_reference"], "low": -0.1, "high": 0.1, "mean": 0.0, "holds_zero": True}
    results["arms"].append({**lag, "learning_rate": "decayed", "against_reference": lost})
    sentence = "The gain of lag over scratch is shown with constant, but not with decayed."
    assert sentence in finding_sentences(results)
