"""A jump of the loss where paths lengthen is distinguished from the noise at constant length."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, pico_config

from lag_megatron.config import RunConfig, StageConfig
from lag_megatron.errors import RunError
from lag_megatron.report.stats.run_files import RunFiles
from tools.bench.training.raptr_switches import switches


def files_of(config: RunConfig, losses: list[float]) -> RunFiles:
    metrics = tuple({"step": step, "train/loss": loss} for step, loss in enumerate(losses, 1))
    return RunFiles(path=ROOT, config=config, run={}, metrics=metrics, journal=(), growths=())


@pytest.mark.parametrize(("jump", "above"), [(0.0, False), (0.2, True)])
def test_a_jump_at_a_switch_stands_out_from_noise(jump: float, above: bool) -> None:
    stages = [StageConfig(steps=200, path_length=n) for n in (6, 9, 12)]
    config = replace(pico_config(num_layers=12), stages=tuple(stages))
    noise = np.random.default_rng(0).normal(0, 0.05, 600)
    losses = 5 - 0.001 * np.arange(600) + noise + jump * (np.arange(600) >= 200)
    found = list(switches(files_of(config, losses.tolist()), window=25))
    assert [(s.step, s.lengths) for s in found] == [(200, (6, 9)), (400, (9, 12))]
    assert found[0].usual == pytest.approx(-0.025, abs=0.01)
    assert (found[0].deviations > 4) is above
    assert found[1].deviations < 4
    assert found[0].change == pytest.approx(jump - 0.025, abs=0.05)


def test_a_control_takes_away_what_batches_do() -> None:
    stages = (StageConfig(steps=200, path_length=6), StageConfig(steps=200))
    config = replace(pico_config(num_layers=12), stages=stages)
    whole = replace(config, stages=(StageConfig(steps=390),))
    rng = np.random.default_rng(1)
    batches, own = rng.normal(0, 0.5, 400), rng.normal(0, 0.01, 400)
    losses = 5 + batches + own + 0.1 * (np.arange(400) >= 200)
    run, control = files_of(config, losses.tolist()), files_of(whole, (4 + batches[:390]).tolist())
    (alone,) = switches(run, window=25)
    (paired,) = switches(run, window=25, control=control)
    assert paired.change == pytest.approx(0.1, abs=0.02)
    assert paired.deviations > 10 > alone.deviations
    other = files_of(replace(whole, seed=5), losses.tolist())
    with pytest.raises(RunError, match="another seed"):
        list(switches(run, window=25, control=other))


def test_runs_that_are_too_short_are_refused() -> None:
    stages = (StageConfig(steps=20, path_length=6), StageConfig(steps=200))
    config = replace(pico_config(num_layers=12), stages=stages)
    with pytest.raises(RunError, match="too few for a window of 25"):
        list(switches(files_of(config, [1.0] * 220), window=25))
    with pytest.raises(RunError, match="Let it finish"):
        list(switches(files_of(config, [1.0] * 25), window=10))
