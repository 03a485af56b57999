"""The command plan_stages as users call it: schedules, published figures, bad input."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import yaml
from conftest import ROOT

from lag_megatron.cli import plan_stages as tool
from lag_megatron.config.load import merge, parse_config, read_tree
from lag_megatron.config.schema.stage_schedule import start_positions

GROWN = ["--layers", "4", "8", "16", "--hidden", "1024"]


def ask(capsys, *arguments):
    assert tool.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def curve(parameters):
    """Steps, losses and compute of Staged Training's law, written out with its numbers."""
    steps = np.arange(10.0, 60_000.0)
    loss = (8.8e13 / parameters) ** 0.076 + (2 * 2.1e3 / steps) ** 0.76
    return steps, loss, 6 * parameters * 2.1e8 / loss ** (1 / 0.21) * steps


def test_several_growths_against_a_search_over_all_steps(capsys):
    plan = ask(capsys, *GROWN)
    before, spent = math.inf, 0.0
    for stage, layers, tau in zip(
        plan["stages"], (4, 8, 16), (-0.0575, -0.0575, -0.052), strict=True
    ):
        steps, loss, compute = curve(12 * layers * 1024**2)
        start = 0 if before == math.inf else int(np.argmin(np.abs(loss - before)))
        end = np.argmax(np.gradient(np.log(loss), np.log(compute)) > tau)
        spent += compute[end] - (compute[start] if start else 0)
        before = loss[end]
        assert stage["parameters"] == 12 * layers * 1024**2
        assert abs(stage["enters_at_step"] - (steps[start] if start else 0)) <= 2
        assert abs(stage["ends_at_step"] - steps[end]) <= 2
        assert stage["steps"] == stage["ends_at_step"] - stage["enters_at_step"]
        assert stage["loss"] == pytest.approx(before, rel=1e-5)
    assert plan["compute"] == pytest.approx(spent, rel=1e-3)
    assert plan["scratch"]["steps"] == plan["stages"][-1]["ends_at_step"]
    assert plan["saving"] == pytest.approx(1 - spent / compute[end], abs=1e-3)


def test_the_snippet_is_a_configuration_that_stands_where_the_plan_says(capsys):
    plan = ask(capsys, *GROWN)
    snippet = yaml.safe_load(plan["yaml"])
    config = parse_config(merge(read_tree(ROOT / "configs" / "demo.yaml"), snippet))
    assert [config.layers_of(stage) for stage in range(3)] == [4, 8, 16]
    planned = [stage["enters_at_step"] for stage in plan["stages"]]
    assert start_positions(config) == pytest.approx(planned, abs=1)
    assert {stage.growth.pool.operator for stage in config.stages[1:]} == {"staged"}


def test_measured_ratios_and_tokens(capsys):
    by_law = ask(capsys, *GROWN)
    plan = ask(capsys, *GROWN, "--ratio-depth", "1.412", "--seq-length", "1024", "--batch", "512")
    for before, stage in pairwise(plan["stages"]):
        assert stage["enters_at_step"] == pytest.approx(before["ends_at_step"] / 1.412, abs=1)
        assert stage["tokens"] == stage["steps"] * 1024 * 512
    assert plan["saving"] > by_law["saving"]
    assert by_law["stages"][1]["tokens"] is None
    assert tool.main([*GROWN, "--ratio-depth", "1.412"]) == 0
    assert "by the law and the measured rho" in capsys.readouterr().out


def test_thresholds_and_constants_are_taken(capsys):
    earlier = ask(capsys, *GROWN, "--tau-depth", "-0.07", "--tau-optimal", "-0.05")
    assert [stage["until_slope"] for stage in earlier["stages"]] == [-0.07, -0.07, -0.05]
    best = ask(capsys, *GROWN, "--tau-depth", "best")
    assert best["saving"] > ask(capsys, *GROWN)["saving"]
    # Twice the constant of steps is twice as many steps everywhere, and saves the same.
    longer = ask(capsys, *GROWN, "--set", "s_c=4200")
    assert longer["saving"] == pytest.approx(ask(capsys, *GROWN)["saving"])
    steps = [ask(capsys, *GROWN)["stages"][0]["steps"], longer["stages"][0]["steps"]]
    assert steps[1] == pytest.approx(2 * steps[0], abs=1)
    natural = ask(capsys, *GROWN, "--log-base", "e")["stages"][0]["learning_rate"]
    assert natural < ask(capsys, *GROWN)["stages"][0]["learning_rate"] / 2


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (["--layers", "12", "--hidden", "384", "768"], "no operator that widens yet"),
        (["--layers", "6", "12", "--hidden", "384", "768"], "no operator that widens yet"),
        (["--layers", "4", "6", "--hidden", "256"], "only doubles"),
    ],
)
def test_what_no_configuration_can_do_is_planned_and_said(capsys, sizes, says):
    assert tool.main(sizes) == 0
    shown = capsys.readouterr().out
    assert says in shown
    assert "rewind" not in shown
    assert "Saving: " in shown


def test_published_figures_and_which_are_reproduced(capsys):
    data = ask(capsys)
    found = {check["name"]: check for check in data["checks"]}
    missed = {name for name, check in found.items() if check["verdict"] == "not reproduced"}
    assert missed == {"tau_depth", "tau_width", "tau_both", "rho_depth by the law"}
    assert found["rho_depth by the law"]["law"] == pytest.approx(1.617, abs=1e-3)
    assert "1.831 at tau_width" in found["rho_depth by the law"]["note"]
    rates = [check for name, check in found.items() if name.startswith("learning rate")]
    assert len(rates) == 6
    assert all(rate["law"] == pytest.approx(rate["published"], rel=1e-12) for rate in rates)
    savings = {(row["growth"], row["large"]): row["saving"] for row in data["growths"]}
    for large in ("12L/768", "24L/1536"):
        assert savings["depth", large] == pytest.approx(0.066, abs=5e-4)
        assert savings["width", large] == pytest.approx(0.078, abs=5e-4)
    assert tool.main([]) == 0
    shown = capsys.readouterr().out
    assert "12L/1536  24L/1536" in shown
    assert "no operator that widens yet" in shown


def test_a_law_that_does_not_fit_is_said_not_to_reproduce(capsys):
    verdicts = {c["name"]: c["verdict"] for c in ask(capsys, "--set", "alpha_n=0.08")["checks"]}
    assert verdicts["tau_opt"] == "not reproduced"
    assert verdicts["rho_width by the law"] == "not reproduced"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "4", "8"], "--hidden 0"),
        (["--layers", "4", "8", "--hidden", "64", "64", "64"], "--layers has 2 values"),
        (["--layers", "8", "4", "--hidden", "64"], "8L/64 -> 4L/64"),
        (["--layers", "4", "4", "--hidden", "64"], "rising order"),
        (["--layers", "0", "--hidden", "64"], "at least 1 layer"),
        ([*GROWN, "--set", "alphan=1"], "Did you mean 'alpha_n'?"),
        ([*GROWN, "--set", "alpha_n=x"], "expected a number"),
        ([*GROWN, "--set", "alpha_n=0"], "finite number above 0"),
        ([*GROWN, "--tau-depth", "-0.5"], "Choose a threshold"),
        ([*GROWN, "--tau-depth", "-0.001"], "its own end"),
        ([*GROWN, "--ratio-depth", "0.5"], "1 or more"),
        ([*GROWN, "--batch", "8"], "give both"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(capsys, arguments, says):
    assert tool.main(arguments) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
