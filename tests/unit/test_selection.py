"""Ranking, regret, ties and the decision, on tables small enough to check by hand."""

import json
import math

import pytest

from lag_megatron.errors import RunError
from lag_megatron.selection import (
    ProbeCost,
    ProbeRecord,
    build_decision,
    lag_rule,
    losses_at,
    pearson,
    rank,
    regret,
    relative_regret,
    spearman,
    ties,
)

COST = ProbeCost(probe_steps=80, tokens=1000, flops=2.0e9, seconds=3.5)


def finished(*losses: float, batches: tuple[float, ...] = ()) -> ProbeRecord:
    curve = tuple((20 * number, loss) for number, loss in enumerate(losses))
    return ProbeRecord(status="finished", steps=40, curve=curve, batches=batches)


def decide(records: dict[str, ProbeRecord], pool: tuple[str, ...] | None = None) -> dict:
    return build_decision(
        records,
        pool=pool or tuple(records),
        growth=1,
        rule="lag",
        lag=40,
        base_val_loss=2.5,
        cost=COST,
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
    assert ties(batches, winner="winner") == expected
    assert ties(batches, winner="winner") == expected


def test_one_batch_tells_nobody_apart() -> None:
    assert ties({"a": [1.0], "b": [9.0]}, winner="a") == ["b"]


def test_decision_has_the_documented_structure() -> None:
    decision = decide(
        {
            "a": finished(2.6, 2.4, 2.2, batches=(2.1, 2.3)),
            "b": finished(2.5, 2.4, 2.3, batches=(2.2, 2.4)),
            "c": ProbeRecord(status="failed", reason="out of memory", steps=3),
        }
    )
    assert decision == {
        "growth": 1,
        "rule": "lag",
        "lag": 40,
        "chosen": "a",
        "base_val_loss": 2.5,
        "candidates": [
            {
                "id": "a",
                "status": "finished",
                "reason": "",
                "steps": 40,
                "curve": [[0, 2.6], [20, 2.4], [40, 2.2]],
            },
            {
                "id": "b",
                "status": "finished",
                "reason": "",
                "steps": 40,
                "curve": [[0, 2.5], [20, 2.4], [40, 2.3]],
            },
            {"id": "c", "status": "failed", "reason": "out of memory", "steps": 3, "curve": []},
        ],
        "cost": {
            "probe_steps": 80,
            "exhaustive_steps": 120,
            "tokens": 1000,
            "flops": 2.0e9,
            "seconds": 3.5,
        },
        "phase_transition": None,
        "ties": [],
    }
    assert json.loads(json.dumps(decision, allow_nan=False)) == decision


def test_losses_that_are_not_finite_fail_and_leave_no_nan_in_the_file() -> None:
    decision = decide({"a": finished(2.0, math.nan, 1.0), "b": finished(2.0, 2.0, 1.9)})
    assert decision["chosen"] == "b"
    assert decision["candidates"][0]["status"] == "failed"
    assert decision["candidates"][0]["reason"] == "validation loss nan at step 20"
    json.dumps(decision, allow_nan=False)


def test_a_candidate_without_a_loss_at_the_lag_has_failed() -> None:
    decision = decide({"a": finished(2.0, 1.0), "b": finished(2.0, 2.0, 1.9)})
    assert decision["chosen"] == "b"
    assert decision["candidates"][0]["reason"] == "no validation loss at step 40"


def test_a_failed_candidate_never_wins() -> None:
    failed = ProbeRecord(status="failed", reason="out of time", steps=40, curve=((40, 0.1),))
    assert decide({"a": failed, "b": finished(2.0, 2.0, 1.9)})["chosen"] == "b"


def test_pool_order_settles_equal_losses() -> None:
    records = {"a": finished(3.0, 2.0, 1.0), "b": finished(3.0, 2.0, 1.0)}
    assert decide(records, pool=("b", "a"))["chosen"] == "b"


def test_nobody_left_names_every_reason() -> None:
    records = {"a": ProbeRecord(status="failed", reason="loss 31.2 above growth.max_loss")}
    with pytest.raises(RunError, match="none of the 2 candidates") as error:
        decide(records, pool=("a", "b"))
    assert "a: loss 31.2 above growth.max_loss" in str(error.value)
    assert "b: was not probed" in str(error.value)
