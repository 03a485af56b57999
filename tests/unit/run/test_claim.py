"""A run directory belongs to one configuration, and a refusal shows what differs."""

import pytest
from configuring import config

from lag_megatron.errors import RunError
from lag_megatron.run.directory import RunDirectory, claim
from lag_megatron.run.journal import Journal

STAGES = "stages=[{steps: 100}, {steps: 300, num_layers: 6}]"


def refused(run, *overrides):
    with pytest.raises(RunError) as caught:
        claim(run, config(*overrides))
    text = str(caught.value)
    heading = f"{run.root}: holds a run with other settings: "
    assert text.startswith(heading)
    return text.removeprefix(heading).partition(". Give another --run-dir")[0]


@pytest.fixture
def run(tmp_path):
    claim(RunDirectory(tmp_path), config(STAGES))
    return RunDirectory(tmp_path)


@pytest.mark.parametrize(
    ("stages", "differences"),
    [
        ("[{steps: 100}, {steps: 400, num_layers: 6}]", "stages.1.steps (300 there, 400 now)"),
        (
            "[{steps: 100}, {steps: 300, num_layers: 6}, {steps: 500, num_layers: 8}]",
            "stages.2 (nothing there, {steps: 500, num_layers: 8} now)",
        ),
        ("[{steps: 100}]", "stages.1 ({steps: 300, num_layers: 6} there, nothing now)"),
        (
            "[{steps: 100}, {steps: 300, num_layers: 6, growth: {eta: 5}}]",
            "stages.1.growth.eta (3 there, 5 now)",
        ),
    ],
)
def test_of_changed_stages_the_entries_that_differ_are_shown(run, stages, differences):
    assert refused(run, f"stages={stages}") == differences


def test_of_a_changed_mixture_the_entries_that_differ_are_shown(tmp_path):
    run = RunDirectory(tmp_path)
    first = "{name: a, weight: 1, paths: [x]}"
    claim(run, config(f"data.mixture=[{first}]"))
    found = refused(run, f"data.mixture=[{first}, {{name: b, weight: 2, paths: [y]}}]")
    assert found.startswith("data.mixture.1 (nothing there, {name: b, weight: 2.0")
    found = refused(run, "data.mixture=[{name: a, weight: 3, paths: [x]}]")
    assert found == "data.mixture.0.weight (1.0 there, 3.0 now)"


def test_a_run_whose_settings_were_deleted_is_not_taken_over(run):
    Journal(run.journal).append("run_started")
    (run.root / "config.yaml").unlink()
    with pytest.raises(RunError, match=r"config\.yaml: missing.*Restore it.*another --run-dir"):
        claim(run, config(STAGES))
    assert not (run.root / "config.yaml").exists()
