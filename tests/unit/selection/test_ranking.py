"""Ranking, correlation, regret and ties, on tables small enough to check by hand."""

import math

import numpy as np
import pytest

from lag_megatron.selection import (
    lag_rule,
    losses_at,
    paired_interval,
    pearson,
    rank,
    regret,
    relative_regret,
    spearman,
    tied_candidates,
)


def test_rank_puts_equal_losses_in_pool_order_and_missing_last() -> None:
    losses = {"a": None, "b": 2.0, "c": math.nan, "d": 1.0, "e": 2.0, "f": math.inf}
    assert rank(losses) == ["d", "b", "e", "a", "c", "f"]
    assert lag_rule(losses) == "d"


def test_nobody_is_chosen_without_a_finite_loss() -> None:
    assert lag_rule({}) is None
    assert lag_rule({"a": None, "b": math.nan}) is None


def test_losses_at_a_step() -> None:
    curves = {"a": [(0, 3.0), (10, 2.0)], "b": [(0, 4.0)], "c": [(10, math.inf)]}
    assert losses_at(curves, step=10) == {"a": 2.0, "b": None, "c": None}


def test_correlation_over_shared_candidates() -> None:
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": None, "e": 9.0}
    assert spearman(first, {"a": 10.0, "b": 20.0, "c": 1000.0, "d": 1.0}) == pytest.approx(1)
    assert pearson(first, {"a": 3.0, "b": 2.0, "c": 1.0}) == pytest.approx(-1)
    assert spearman(first, {"a": 1.0, "b": 3.0, "c": 2.0}) == pytest.approx(0.5)


def test_equal_losses_share_a_rank() -> None:
    first = {"a": 1.0, "b": 1.0, "c": 2.0}
    second = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert spearman(first, second) == pytest.approx(math.sqrt(3) / 2)


def test_no_correlation_without_variation_or_with_two_candidates() -> None:
    assert spearman({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}) is None
    assert pearson({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 2.0, "c": 3.0}) is None


# Karp et al. 2024, table 1 (BERT-base, 12 to 16 layers): final validation losses.  The worst of
# the 30 candidates is not printed; the range 0.05184 follows from the printed regrets.
TABLE_1 = {"oracle": 1.7461, "last block": 1.7747, "random block": 1.7875, "worst": 1.79794}


@pytest.mark.parametrize(
    ("early_best", "absolute", "relative"),
    [("oracle", 0, 0), ("random block", 0.0414, 0.7986), ("last block", 0.0286, 0.5517)],
)
def test_regret_is_table_1(early_best: str, absolute: float, relative: float) -> None:
    early = {id_: 1.8 if id_ == early_best else 1.9 for id_ in TABLE_1}
    assert regret(early, TABLE_1) == pytest.approx(absolute, abs=5e-5)
    assert relative_regret(early, TABLE_1) == pytest.approx(relative, abs=5e-4)


def test_regret_of_degenerate_tables() -> None:
    assert regret({"a": 1.0}, {"b": 1.0}) is None
    assert relative_regret({"a": None}, {"a": 1.0}) is None
    assert relative_regret({"a": 1.0, "b": 2.0}, {"a": 5.0, "b": 5.0}) == 0


def test_ties_are_paired() -> None:
    winner = [1.0, 5.0, 2.0, 8.0, 3.0, 4.0, 7.0, 6.0]
    noise = [0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.1, -0.09]
    batches = {
        "winner": winner,
        "always a bit worse": [loss + 0.01 + 0.001 * n for n, loss in enumerate(winner)],
        "now better, now worse": [a + b for a, b in zip(winner, noise, strict=True)],
        "shifted": [loss + 0.01 for loss in winner],
        "same": winner,
    }
    expected = ["now better, now worse", "same"]
    assert tied_candidates(batches, winner="winner") == expected
    assert tied_candidates(batches, winner="winner") == expected


def test_one_batch_tells_nobody_apart() -> None:
    assert tied_candidates({"a": [1.0], "b": [9.0]}, winner="a") == ["b"]


def test_paired_interval_is_a_bootstrap_over_batches() -> None:
    rng = np.random.default_rng(7)
    first = rng.normal(2.5, 0.4, size=40)  # batches differ by far more than candidates do
    second = first - rng.normal(0.02, 0.03, size=40)
    draws = rng.integers(0, 40, size=(50_000, 40))
    expected = np.quantile((first - second)[draws].mean(axis=1), [0.025, 0.975])
    interval = paired_interval(first.tolist(), second.tolist())
    assert interval == pytest.approx(tuple(expected), abs=6e-4)


def test_paired_interval_of_degenerate_samples() -> None:
    assert paired_interval([1.0], [2.0]) is None
    assert paired_interval([], []) is None
    assert paired_interval([1.5, 2.5], [1.0, 2.0]) == (0.5, 0.5)
    with pytest.raises(AssertionError, match="1 batches against 2"):
        paired_interval([1.0], [1.0, 2.0])  # NumPy would pair the one with both
