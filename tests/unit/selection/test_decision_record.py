"""The decision of a growth event: its structure, its winner, and whose failure changes it."""

import json
import math

import pytest

from lag_megatron.config import GrowthConfig
from lag_megatron.errors import RunError
from lag_megatron.selection import Evaluation, ProbeCost, ProbeRecord, build_decision, judge

COST = ProbeCost(probe_steps=80, tokens=1000, flops=2.0e9, seconds=3.5)
LAG = GrowthConfig(rule="lag", lag=40)


def finished(*losses: float, batches: tuple[float, ...] = ()) -> ProbeRecord:
    """Evaluated every 20 steps; ``batches`` are those of the last evaluation."""
    last = len(losses) - 1
    curve = tuple(
        Evaluation(20 * number, loss, batches if number == last else ())
        for number, loss in enumerate(losses)
    )
    return ProbeRecord(status="finished", steps=20 * last, curve=curve)


def decide(
    records: dict[str, ProbeRecord],
    pool: tuple[str, ...] | None = None,
    settings: GrowthConfig = LAG,
) -> dict:
    """As the coordinator does: a verdict on those that finished, and the decision."""
    pool = pool or tuple(records)
    curves = {id_: records[id_].curve for id_ in pool if id_ in records}
    alive = [
        id_
        for id_, curve in curves.items()
        if records[id_].status == "finished"
        and math.isfinite(dict(losses(curve)).get(40, math.nan))
    ]
    return build_decision(
        records,
        pool=pool,
        growth=1,
        settings=settings,
        verdicts=[judge(settings, 40, curves, alive=alive)] if alive else [],
        base_val_loss=2.5,
        cost=COST,
    )


def losses(curve: tuple[Evaluation, ...]) -> list[tuple[int, float]]:
    return [(evaluation.step, evaluation.loss) for evaluation in curve]


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
            "coordinator_seconds": 0.0,
        },
        "phase_transition": None,
        "ties": [],
        "rung_value": "last",
        "rungs": [
            {
                "rung": 40,
                "rank_correlation": None,
                "transition": None,
                "goes_on": ["a", "b"],
                "stopped": [],
            }
        ],
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
    failed = ProbeRecord(
        status="failed", reason="out of time", steps=40, curve=(Evaluation(40, 0.1),)
    )
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


def test_ties_are_those_of_the_value_that_decided() -> None:
    better, same = (1.0, 2.0, 3.0), (1.1, 1.9, 3.0)
    curves = {
        "a": (Evaluation(0, 4.0), Evaluation(40, 2.0, better, 1.9, better)),
        "b": (Evaluation(0, 4.0), Evaluation(40, 2.1, (1.1, 2.1, 3.2), 2.0, same)),
        "c": (Evaluation(0, 4.0), Evaluation(40, 2.2, same, 2.1, (1.2, 2.2, 3.3))),
    }
    records = {
        id_: ProbeRecord(status="finished", steps=40, curve=curve) for id_, curve in curves.items()
    }
    assert decide(records)["ties"] == ["c"]
    by_average = decide(records, settings=GrowthConfig(rule="lag", lag=40, rung_value="ema"))
    assert by_average["ties"] == ["b"]
    assert by_average["rung_value"] == "ema"


def test_decision_of_halving() -> None:
    settings = GrowthConfig(lag=40, rungs=(20, 40), eta=2, min_rank_correlation=-1)
    curves = {
        id_: finished(*losses, batches=(losses[-1], losses[-1] + 0.1)).curve
        for id_, losses in {
            "a": (3, 2.9, 1),
            "b": (4, 2, 2),
            "c": (5, 2.1, 1.5),
            "d": (6, 9),
        }.items()
    }
    alive = ["a", "b", "c", "d"]
    first = judge(settings, 20, curves, alive=alive)
    last = judge(settings, 40, curves, alive=["b", "c"])
    records = {
        "a": ProbeRecord(status="stopped", steps=20, curve=curves["a"][:2]),
        "b": ProbeRecord(status="finished", steps=40, curve=curves["b"]),
        "c": ProbeRecord(status="finished", steps=40, curve=curves["c"]),
        "d": ProbeRecord(status="stopped", reason="asked to", steps=20, curve=curves["d"]),
    }
    decision = build_decision(
        records,
        pool=alive,
        growth=2,
        settings=settings,
        verdicts=[first, last],
        base_val_loss=3.0,
        cost=COST,
    )
    assert decision["chosen"] == "c"
    assert (decision["rule"], decision["lag"], decision["ties"]) == ("halving", 40, [])
    assert [c["status"] for c in decision["candidates"]] == [
        "stopped",
        "finished",
        "finished",
        "stopped",
    ]
    assert [c["reason"] for c in decision["candidates"]] == [
        "3rd of 4 at step 20: 2.9000 against 2.1000 of the last that went on",
        "",
        "",
        "asked to",
    ]
    assert decision["cost"]["exhaustive_steps"] == 160
    assert [(r["goes_on"], r["stopped"]) for r in decision["rungs"]] == [
        (["b", "c"], ["a", "d"]),
        (["c", "b"], []),
    ]
    assert json.loads(json.dumps(decision, allow_nan=False)) == decision


def test_a_winner_that_fails_later_gives_way_to_the_next() -> None:
    curves = {"a": finished(3.0, 2.0, 1.0).curve, "b": finished(3.0, 2.0, 1.5).curve}
    verdict = judge(LAG, 40, curves, alive=("a", "b"))
    records = {
        "a": ProbeRecord(status="failed", reason="NaN", steps=70, curve=curves["a"]),
        "b": ProbeRecord(status="finished", steps=90, curve=curves["b"]),
    }
    decision = build_decision(
        records,
        pool=("a", "b"),
        growth=1,
        settings=LAG,
        verdicts=[verdict],
        base_val_loss=3.0,
        cost=COST,
    )
    assert decision["chosen"] == "b"


def test_an_exhaustive_run_survives_the_failure_of_all_that_went_on() -> None:
    """Those that the rule stopped were trained too, and are a choice left."""
    settings = GrowthConfig(lag=40, rungs=(20, 40), eta=2, min_rank_correlation=-1)
    curves = {
        "a": finished(3.0, 1.0, 1.0).curve,
        "b": finished(3.0, 2.0, 1.7).curve,
        "c": finished(3.0, 2.0, 1.5).curve,
    }
    verdicts = [
        judge(settings, 20, curves, alive=("a", "b", "c")),
        judge(settings, 40, curves, alive=("a", "b")),
    ]
    records = {
        id_: ProbeRecord(status="failed" if id_ in "ab" else "finished", steps=90, curve=curve)
        for id_, curve in curves.items()
    }
    decision = build_decision(
        records,
        pool=tuple(curves),
        growth=1,
        settings=settings,
        verdicts=verdicts,
        base_val_loss=3.0,
        cost=COST,
    )
    assert (decision["chosen"], decision["ties"]) == ("c", [])
