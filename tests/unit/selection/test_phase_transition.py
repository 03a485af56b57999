"""The phase transition: found where one is planted, and not where there is none."""

import math

import numpy as np
import pytest
from judging import curves_of, planted
from scipy.stats import spearmanr

from lag_megatron.selection import Evaluation, phase_transition, self_correlation


def test_self_correlation_is_scipys() -> None:
    rng = np.random.default_rng(3)
    losses = rng.normal(size=(9, 4)).round(1)  # rounded: equal losses occur
    curves = curves_of((0, 5, 7, 9), {str(n): row for n, row in enumerate(losses.tolist())})
    assert np.allclose(self_correlation(curves, (0, 5, 7, 9)), spearmanr(losses).statistic)
    assert self_correlation(curves, (0, 6))[0] == [pytest.approx(1), None]


EVERY_FIVE = tuple(range(0, 201, 5))


@pytest.mark.parametrize("seed", range(8))
def test_a_planted_transition_is_found_and_not_before_it_is_there(seed: int) -> None:
    curves = planted(50, EVERY_FIVE, seed=seed)
    assert phase_transition(curves, threshold=0.7, until=45) is None
    assert phase_transition(curves, threshold=0.7, until=50) is None
    assert phase_transition(curves, threshold=0.7, until=60) is None  # 60 < 1.5 * 50
    for until in (75, 100, 150, 200):
        found = phase_transition(curves, threshold=0.7, until=until)
        assert found is not None
        assert 50 <= found <= 55


@pytest.mark.parametrize("seed", range(4))
def test_one_noisy_evaluation_does_not_hide_the_transition(seed: int) -> None:
    curves = planted(50, EVERY_FIVE, seed=seed)
    rng = np.random.default_rng(100 + seed)
    for curve in curves.values():
        curve[16] = Evaluation(80, float(rng.normal()))
    assert phase_transition(curves, threshold=0.7, until=150) == 50


def test_the_first_ranking_is_not_taken_for_the_lasting_one() -> None:
    """Candidates keep the order in which they leave growth for a while."""
    curves = planted(1000, EVERY_FIVE, noise=0.0, seed=0)
    assert phase_transition(curves, threshold=0.8, until=200) is None
    without_zero = {id_: curve[1:] for id_, curve in curves.items()}
    assert phase_transition(without_zero, threshold=0.8, until=200) == 5
    for curve in curves.values():  # function-preserving operators: nobody differs at 0
        curve[0] = Evaluation(0, 2.0)
    assert phase_transition(curves, threshold=0.8, until=200) == 5


def test_noise_alone_has_no_transition() -> None:
    for seed in range(5):
        curves = planted(50, EVERY_FIVE, noise=100, seed=seed)
        assert phase_transition(curves, threshold=0.7, until=200) is None


def test_a_transition_takes_candidates_and_evaluations() -> None:
    steps = (0, 10, 12, 16, 20)
    curves = planted(10, steps, noise=0.0, seed=0)
    assert phase_transition(curves, threshold=0.8, until=12) is None
    assert phase_transition(curves, threshold=0.8, until=16) == 10
    two = {id_: curves[id_] for id_ in ("0", "1")}
    assert phase_transition(two, threshold=0.8, until=20) is None
    assert phase_transition({}, threshold=0.8, until=20) is None


def test_candidates_that_ended_or_failed_do_not_count() -> None:
    curves = planted(50, EVERY_FIVE, noise=0.0, seed=0)
    expected = phase_transition(curves, threshold=0.8, until=200)
    curves["stopped"] = curves["3"][:15]
    curves["diverged"] = [Evaluation(e.step, e.loss if e.step < 90 else math.nan)
                          for e in reversed(curves["4"])]  # fmt: skip
    assert phase_transition(curves, threshold=0.8, until=200) == expected == 50
