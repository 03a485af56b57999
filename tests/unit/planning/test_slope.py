"""The measured slope of a training curve: values, when it counts as flat again, bad input."""

import math

import numpy as np
import pytest

from lag_megatron.errors import ConfigError, RunError
from lag_megatron.planning.staged_training.scaling_law import ScalingLaw
from lag_megatron.planning.staged_training.slope import has_flattened, slopes

LAW = ScalingLaw()
SIZE = 5e7
TAU = -0.0575
EVERY = 100


def law_curve(*, until, noise=0.0, seed=0):
    """The law's curve at every hundredth step, noise relative to the loss."""
    steps = np.arange(EVERY, until, EVERY, dtype=np.float64)
    losses = LAW.loss(SIZE, steps)
    losses *= np.exp(noise * np.random.default_rng(seed).standard_normal(len(steps)))
    return list(zip(LAW.compute(SIZE, steps), losses, strict=True))


def triggers_at(points, *, window):
    """The first number of points at which the curve counts as flat; None if never."""
    counts = range(1, len(points) + 1)
    return next((n for n in counts if has_flattened(points[:n], tau=TAU, window=window)), None)


def test_slopes_are_least_squares_over_each_window():
    draw = np.random.default_rng(1)
    compute, loss = np.cumsum(draw.uniform(1, 5, 30)), draw.uniform(1, 9, 30)
    points = list(zip(compute, loss, strict=True))
    expected = [
        np.polynomial.polynomial.polyfit(
            np.log10(compute[end - 7 : end]), np.log10(loss[end - 7 : end]), 1
        )[1]
        for end in range(7, 31)
    ]
    assert slopes(points, 7) == pytest.approx(expected)
    assert slopes([(3e18 * c, loss) for c, loss in points], 7) == pytest.approx(expected)


def test_too_few_points_step_zero_and_repeated_points():
    line = [(c, c**-0.1) for c in (1.0, 2.0, 4.0, 8.0)]
    assert slopes(line[:3], 4) == []
    assert not has_flattened(line[:3], tau=TAU, window=4)
    assert slopes([(0.0, 7.0), *line], 4) == pytest.approx([-0.1])
    # Validated twice at one point, as after a resume: the later one counts.
    again = [line[0], (2.0, 99.0), *line[1:]]
    assert slopes(again, 4) == pytest.approx([-0.1])
    assert slopes([(5.0, 2.0)] * 9, 2) == []


@pytest.mark.parametrize("window", [2, 5, 20])
def test_it_triggers_within_a_window_of_the_laws_step(window):
    points = law_curve(until=30_000)
    exact = LAW.step_at_slope(SIZE, TAU)
    step = EVERY * triggers_at(points, window=window)
    assert exact <= step <= exact + EVERY * window


def test_with_noise_it_triggers_near_the_laws_step():
    exact = LAW.step_at_slope(SIZE, TAU)
    found = [
        EVERY * triggers_at(law_curve(until=26_000, noise=5e-4, seed=seed), window=60)
        for seed in range(6)
    ]
    assert all(0.8 * exact < step < 1.25 * exact for step in found)
    # A window trails by about half its length.
    assert np.median(found) == pytest.approx(exact + 30 * EVERY, rel=0.05)


def test_the_flat_part_of_a_warm_up_does_not_trigger():
    after = law_curve(until=30_000)[9:]
    start = after[0][0] / 40
    plateau = [(compute, after[0][1] * 1.001) for compute in np.linspace(start, after[0][0], 40)]
    points = plateau[:-1] + after
    assert max(slopes(points[:39], 5)) > TAU
    found = triggers_at(points, window=5)
    exact = LAW.step_at_slope(SIZE, TAU)
    assert exact <= EVERY * (found - 39 + 9) <= exact + 5 * EVERY


def test_a_curve_that_stays_steep_never_triggers_nor_does_one_that_always_was_flat():
    assert triggers_at([(c, c**-0.07) for c in np.geomspace(1, 1e6, 200)], window=5) is None
    assert triggers_at([(c, c**-0.02) for c in np.geomspace(1, 1e6, 200)], window=5) is None
    short = int(0.9 * LAW.step_at_slope(SIZE, TAU))
    assert triggers_at(law_curve(until=short), window=5) is None


def test_a_curve_that_becomes_steep_again_is_not_flat():
    """The latest slope decides: a rate that decays late steepens the curve once more."""
    flat = law_curve(until=30_000)
    compute, loss = flat[-1]
    steep = [(compute * x, loss * x**-0.3) for x in np.geomspace(1.01, 1.2, 20)]
    assert has_flattened(flat, tau=TAU, window=5)
    assert not has_flattened(flat + steep, tau=TAU, window=5)


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ([(1.0, 3.0), (2.0, math.nan)], "loss nan"),
        ([(1.0, math.inf)], "loss inf"),
        ([(1.0, 0.0)], r"loss 0\.0"),
        ([(math.nan, 3.0)], "compute nan"),
        ([(-1.0, 3.0)], r"compute -1\.0"),
        ([(2.0, 3.0), (1.0, 3.0)], "falls from 2 to 1"),
    ],
)
def test_points_without_a_logarithm_or_out_of_order_are_refused(points, says):
    with pytest.raises(RunError, match=says):
        has_flattened(points, tau=TAU, window=2)


@pytest.mark.parametrize(("tau", "window"), [(0.0, 5), (math.nan, 5), (0.1, 5), (-0.05, 1)])
def test_settings_without_meaning_are_refused(tau, window):
    with pytest.raises(ConfigError):
        has_flattened([], tau=tau, window=window)
