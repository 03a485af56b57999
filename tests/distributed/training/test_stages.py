"""Many stages in one run: policies, stages that their slope ends, and kills in between."""

import json
import os
import signal

import numpy as np
import pytest
from conftest import run_ranks, sparing
from whole_runs import lines_of, losses_of, train

from lag_megatron.errors import LagError

POLICY = ["model.num_layers=1", "growth.lag=2", "growth.rungs=[1, 2]", "checkpoint.interval=3",
          "stages={policy: adaptive, layers: [1, 2, 3, 4, 5, 6], steps: 24}"]  # fmt: skip
WINDOW = 5


def events_of(run_dir, name):
    return [event for event in lines_of(run_dir, "journal.jsonl") if event["event"] == name]


def decisions_of(run_dir):
    found = []
    for path in sorted(run_dir.glob("growth*/decision.json")):
        decision = json.loads(path.read_text())
        del decision["cost"]["seconds"], decision["cost"]["coordinator_seconds"]
        found.append(decision)
    return found


def killed_in_probes_of(growth):
    """Rank 0 dies, as by kill -9, in the middle of the second candidate of that event."""

    def fault():
        if os.environ["RANK"] != "0":
            return
        from lag_megatron.training.training_context import TrainingContext

        honest, started = TrainingContext.step, {"probes": 0}

        def step(self, engine, step, *, stage):
            if stage == growth and (self.run.growth(growth) / "pool.json").exists():
                if not (self.run.growth(growth) / "decision.json").exists():
                    started["probes"] += 1
                if started["probes"] == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
            return honest(self, engine, step, stage=stage)

        TrainingContext.step = step

    return fault


@pytest.mark.slow
def test_killed_in_the_fourth_stages_probes_it_goes_on_as_if_nothing_had_been(tiny, tmp_path):
    run_ranks(train, 2, tiny, tmp_path / "calm", POLICY)
    fault = killed_in_probes_of(3)
    with pytest.raises((ChildProcessError, RuntimeError)):  # whichever rank is noticed first
        run_ranks(train, 2, tiny, tmp_path / "killed", POLICY, "auto", fault, timeout=120)
    assert len(decisions_of(tmp_path / "killed")) == 2
    assert events_of(tmp_path / "killed", "probe_started")[-1]["growth"] == 3
    run_ranks(train, 2, tiny, tmp_path / "killed", POLICY)
    for key in ("train/loss", "val/loss", "train/lr"):
        assert losses_of(tmp_path / "killed", key) == losses_of(tmp_path / "calm", key)
    assert decisions_of(tmp_path / "killed") == decisions_of(tmp_path / "calm")
    newest = sorted((tmp_path / "killed" / "stage05").glob("step*"))[-1]
    history = json.loads((newest / "manifest.json").read_text())["growth_history"]
    chosen = [decision["chosen"] for decision in decisions_of(tmp_path / "calm")]
    assert len(history) == len(chosen) == 5
    for plan, id_ in zip(history, chosen, strict=True):
        assert id_.startswith(f"i{plan['options']['index']}-b{plan['options']['block_size']}-")


SLOPE = ["model.dropout=0.0", "tracking.validation_interval=3", "data.validation_tokens=512",
         "stages=[{steps: 90, until_slope: -0.02}, {steps: 12, num_layers: 4, rewind: 1.5}]",
         "optimizer.schedule.growth_warmup_steps=4",
         "growth={pool: {operator: last}, rule: lag, lag: 2, rungs: [2]}"]  # fmt: skip


def numpy_slopes(run_dir, stage):
    """By polyfit, over windows of the validations of a stage."""
    rows = [r for r in lines_of(run_dir, "metrics.jsonl") if "val/loss" in r]
    points = [(r["step"], r["val/loss"]) for r in rows if r["stage"] == stage and r["step"]]
    logs = np.log(np.array(points))
    starts = range(len(points) - WINDOW + 1)
    return {points[i + WINDOW - 1][0]: np.polyfit(*logs[i : i + WINDOW].T, 1)[0] for i in starts}


@pytest.fixture(scope="module")
def sloping(tmp_path_factory, tiny_tree):
    """A run whose first stage ends where its slope has flattened."""
    folder = tmp_path_factory.mktemp("sloping")
    run_ranks(train, 2, tiny_tree(folder), folder / "run", SLOPE)
    return folder / "run"


def test_a_stage_ends_where_its_slope_has_flattened(sloping):
    (cut,) = events_of(sloping, "stage_cut")
    slopes = numpy_slopes(sloping, stage=0)
    passed = [s for s, slope in slopes.items() if slope > -0.02]
    steep = min(s for s, slope in slopes.items() if slope <= -0.02)
    assert cut["step"] == min(step for step in passed if step > steep) == max(slopes)
    assert cut["slope"] == pytest.approx(slopes[cut["step"]], rel=1e-6)
    assert cut["step"] < 90
    (finished,) = events_of(sloping, "run_finished")
    assert finished["step"] == cut["step"] + 12
    assert [e["step"] for e in events_of(sloping, "growth_started")] == [cut["step"]]
    # Rewound, and warmed up again.
    rates = losses_of(sloping, "train/lr")
    assert rates[cut["step"]] == pytest.approx(3e-3)
    assert rates[cut["step"] + 1] == pytest.approx(3e-3 / 4)


def stopped_at(step, *, before):
    """As a kill just before or just after the checkpoint of that step."""

    def fault():
        from lag_megatron.training import trainer

        honest = trainer.save_engine

        def save(engine, path, **rest):
            if rest["step"] == step and before:
                raise LagError("stop here")
            honest(engine, path, **rest)
            if rest["step"] == step:
                raise LagError("stop here")

        trainer.save_engine = save

    return fault


@pytest.mark.parametrize("before", sparing([True, False], slow=lambda before: not before))
def test_a_kill_at_the_end_that_the_slope_chose(before, sloping, tiny, tmp_path):
    (cut,) = events_of(sloping, "stage_cut")
    fault = stopped_at(cut["step"], before=before)
    with pytest.raises(LagError, match="stop here"):
        run_ranks(train, 2, tiny, tmp_path / "run", SLOPE, "auto", fault)
    run_ranks(train, 2, tiny, tmp_path / "run", SLOPE)
    assert len(events_of(tmp_path / "run", "stage_cut")) == 1
    for key in ("train/loss", "val/loss"):
        assert losses_of(tmp_path / "run", key) == losses_of(sloping, key)
