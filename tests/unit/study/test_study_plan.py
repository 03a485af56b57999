"""Plans of studies: equal budgets against brute force, and what is refused before a run."""

import math
from pathlib import Path

import pytest
from studying import ARMS, BASE, LAST, a_step, plan_of, write

from lag_megatron.errors import ConfigError
from lag_megatron.study import load_study, plan_study

ROOT = Path(__file__).parents[3]


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
