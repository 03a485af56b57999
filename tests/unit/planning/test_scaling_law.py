"""Staged Training's scaling law against differences, searches over grids, and published figures."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from lag_megatron.errors import ConfigError, PlanError
from lag_megatron.planning.staged_training.scaling_law import (
    ScalingLaw,
    learning_rate,
    ratio_on_grid,
    step_on_grid,
)

LAW = ScalingLaw()
OTHER = ScalingLaw(
    n_c=3e13, s_c=900.0, b_star=1e8, alpha_n=0.1, alpha_s=0.6, alpha_b=0.3, step_factor=1.0
)
SIZES = (8.5e6, 8.5e7, 6.8e8)
laws = pytest.mark.parametrize("law", [LAW, OTHER], ids=["published", "other"])


def log_loss(law, size, step):
    """Kaplan et al. 2020, equation 1.6, written out once more."""
    of_size = math.exp(law.alpha_n * math.log(law.n_c / size))
    of_steps = math.exp(law.alpha_s * math.log(law.step_factor * law.s_c / step))
    return math.log(of_size + of_steps)


def log_compute(law, size, step):
    batch = math.log(law.b_star) - log_loss(law, size, step) / law.alpha_b
    return math.log(6 * size) + batch + math.log(step)


def measured_slope(law, size, step):
    near, far = step * (1 - 1e-5), step * (1 + 1e-5)
    rise = log_loss(law, size, far) - log_loss(law, size, near)
    return rise / (log_compute(law, size, far) - log_compute(law, size, near))


@laws
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [50.0, 4000.0, 90_000.0])
def test_loss_compute_and_slope(law, size, step):
    assert law.loss(size, step) == pytest.approx(math.exp(log_loss(law, size, step)))
    assert law.compute(size, step) == pytest.approx(math.exp(log_compute(law, size, step)))
    assert law.slope(size, step) == pytest.approx(measured_slope(law, size, step), rel=1e-6)


@laws
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slope", [-0.12, -0.0575, -0.03])
def test_step_at_a_slope_is_where_differences_have_it(law, size, slope):
    found = law.step_at_slope(size, slope)
    searched = brentq(lambda step: measured_slope(law, size, step) - slope, 1.0, 1e9, rtol=1e-12)
    assert found == pytest.approx(searched, rel=1e-5)


@laws
@pytest.mark.parametrize("growth", [2.0, 4.0, 8.0])
def test_growth_ratio_is_that_of_steps_at_one_loss_whatever_the_size(law, growth):
    for size in SIZES:
        grown = law.step_at_slope(size, -0.0575)
        loss = log_loss(law, size, grown)

        def above(step, large=growth * size, loss=loss):
            return log_loss(law, large, step) - loss

        same = brentq(above, 1.0, grown, rtol=1e-12)
        assert law.growth_ratio(growth, -0.0575) == pytest.approx(grown / same, rel=1e-8)
        assert law.step_at_loss(growth * size, law.loss(size, grown)) == pytest.approx(same)


def test_published_steps_and_ratios_on_the_grid():
    assert [step_on_grid(LAW, size, -0.052) for size in SIZES] == [17_270, 21_740, 26_770]
    by_width = [ratio_on_grid(LAW, size, 4.0, -0.0475) for size in SIZES]
    assert by_width == pytest.approx([2.717] * 3, abs=1.5e-3)
    by_depth = [ratio_on_grid(LAW, size, 2.0, -0.0575) for size in SIZES]
    assert by_depth == pytest.approx([1.617] * 3, abs=1e-3)
    # The notebook's 1.831 for depth is the law's at the threshold of width.
    assert ratio_on_grid(LAW, SIZES[0], 2.0, -0.0475) == pytest.approx(1.831, abs=5e-4)


def test_grid_form_is_the_written_out_search():
    size, slope = 3e7, -0.0575
    steps = list(range(4000, 90_000, 10))
    losses = [log_loss(LAW, size, step) for step in steps]
    computes = [log_compute(LAW, size, step) for step in steps]
    inner = range(2, len(steps) - 3)
    smooth = {i: sum(losses[i - 2 : i + 3]) / 5 for i in range(2, len(steps) - 2)}
    found = {i: (smooth[i + 1] - smooth[i]) / (computes[i + 1] - computes[i]) for i in inner}
    steepest = min(found, key=found.__getitem__)
    first = next(i for i in inner if i >= steepest and found[i] > slope)
    assert step_on_grid(LAW, size, slope) == steps[first]
    assert abs(LAW.step_at_slope(size, slope) - steps[first]) <= 10
    with pytest.raises(PlanError, match="longer grid"):
        step_on_grid(LAW, size, slope, steps=range(1000, 4000, 10))


@laws
def test_frontier_slope_is_that_of_the_best_size_for_the_compute(law):
    sizes = np.geomspace(1e5, 1e12, 701)

    def best(compute):
        return min(
            log_loss(law, size, brentq(lambda s, n=size: log_compute(law, n, s) - compute, 1, 1e13))
            for size in sizes
        )

    low, high = math.log(1e19), math.log(1e21)
    assert law.frontier_slope == pytest.approx((best(high) - best(low)) / (high - low), rel=2e-3)


@pytest.mark.parametrize(("growth", "slope"), [(2.0, -0.0575), (4.0, -0.0475), (8.0, -0.03)])
def test_saving_is_the_compute_that_is_not_spent(growth, slope):
    small = 4e7
    grown = LAW.step_at_slope(small, slope)
    for ratio in (LAW.growth_ratio(growth, slope), 1.5):
        before = math.exp(log_compute(LAW, small, grown))
        skipped = math.exp(log_compute(LAW, growth * small, grown / ratio))
        whole = math.exp(
            log_compute(LAW, growth * small, LAW.step_at_slope(growth * small, -0.052))
        )
        saving = LAW.saving(growth, slope, optimal=-0.052, ratio=ratio)
        assert saving == pytest.approx((skipped - before) / whole, rel=1e-9)
    assert LAW.saving(growth, slope, optimal=-0.052) < LAW.saving(
        growth, LAW.best_growth_slope(growth), optimal=-0.052
    )


@laws
@pytest.mark.parametrize("growth", [1.5, 2.0, 8.0])
def test_best_growth_slope_against_every_slope(law, growth):
    grid = np.linspace(law.steepest_slope * 0.999, -0.003, 4000)
    savings = [law.saving(growth, slope, optimal=-0.05) for slope in grid]
    assert law.best_growth_slope(growth) == pytest.approx(grid[int(np.argmax(savings))], abs=1e-4)


def test_learning_rates_with_either_logarithm():
    assert learning_rate(12 * 12 * 768**2) == pytest.approx(0.002132892651963921, rel=1e-13)
    natural = [learning_rate(12 * n * d**2, log_base=math.e) for n, d in ((12, 768), (24, 1536))]
    assert natural == pytest.approx([6.9e-4, 4.0e-4], rel=0.01)
    with pytest.raises(PlanError, match="Use base 10"):
        learning_rate(1e11, log_base=math.e)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: ScalingLaw(alpha_s=-1.0), "alpha_s = -1.0"),
        (lambda: ScalingLaw(n_c=math.nan), "n_c = nan"),
        (lambda: LAW.step_at_slope(1e8, -0.2), "from -0.1645 to 0"),
        (lambda: LAW.step_at_slope(1e8, 0.0), "slope 0.0"),
        (lambda: LAW.step_at_loss(1e8, 1.0), "never reach a loss of 1"),
        (lambda: LAW.growth_ratio(1.0, -0.05), "expected above 1"),
    ],
)
def test_what_the_law_does_not_hold_is_refused(wrong, says):
    with pytest.raises((ConfigError, PlanError), match=says):
        wrong()
