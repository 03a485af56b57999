"""Rules replayed on recorded curves: what they decide when, the steps taken, what is missing."""

import math

import pytest
from judging import UNGUARDED, curves_of, planted

from lag_megatron.config import GrowthConfig
from lag_megatron.errors import RunError
from lag_megatron.selection import MARGIN, Evaluation, replay

AUTO = GrowthConfig(rule="lag", lag="auto", rungs=(25, 50, 75, 100, 150, 200))


@pytest.mark.parametrize("transition", [25, 40, 60])
def test_auto_decides_at_twice_the_transition(transition: int) -> None:
    curves = planted(transition, range(201), noise=0.02, seed=1)
    done = replay(AUTO, curves, pool=tuple(curves))
    seen = done.verdicts[-1].transition
    assert seen == next(s for s in AUTO.evaluation_steps() if s >= transition)
    assert done.lag == next(rung for rung in AUTO.rungs if rung >= MARGIN * seen)
    best = min(curves, key=lambda id_: curves[id_][done.lag].loss)
    assert done.chosen == best
    assert done.probe_steps == done.lag * len(curves)


def test_auto_without_a_transition_goes_to_the_last_rung() -> None:
    curves = planted(1000, range(201), noise=0.0, seed=1)
    halving = GrowthConfig(rung_value="last", lag="auto", rungs=AUTO.rungs, eta=2)
    for growth in (AUTO, halving):
        done = replay(growth, curves, pool=tuple(curves))
        assert (done.lag, set(done.status.values())) == (200, {"finished"})
        assert {verdict.transition for verdict in done.verdicts} == {None}


def test_halving_with_auto_stops_between_the_transition_and_the_decision() -> None:
    """The transition stands as seen before candidates were stopped."""
    growth = GrowthConfig(rung_value="last", lag="auto", rungs=(20, 40, 60, 80, 120), eta=4)
    curves = planted(40, range(121), candidates=8, noise=0.0, seed=2)
    done = replay(growth, curves, pool=tuple(curves))
    assert [v.transition for v in done.verdicts] == [None, None, 40, 40]
    assert [len(v.goes_on) for v in done.verdicts] == [8, 8, 2, 2]
    assert (done.lag, done.probe_steps) == (80, 6 * 60 + 2 * 80)


def test_auto_does_not_need_the_guard_to_be_on() -> None:
    curves = planted(40, range(201), noise=0.02, seed=1)
    growth = GrowthConfig(rule="lag", lag="auto", rungs=AUTO.rungs, min_rank_correlation=-1)
    assert replay(growth, curves, pool=tuple(curves)) == replay(AUTO, curves, pool=tuple(curves))


def test_steps_of_performance_md() -> None:
    """30 candidates, rungs 50, 100 and 200, eta 3: 2400 steps instead of 6000."""
    growth = GrowthConfig(lag=200, rungs=(50, 100, 200), eta=3)
    curves = curves_of(
        growth.evaluation_steps(),
        {str(n): [n / 2] * len(growth.evaluation_steps()) for n in range(30)},
    )
    done = replay(growth, curves, pool=tuple(curves))
    assert done.probe_steps == 20 * 50 + 6 * 100 + 4 * 200 == 2400
    assert [len(verdict.goes_on) for verdict in done.verdicts] == [10, 4, 4]
    assert done.chosen == "0"
    assert done.status["3"] == "finished"
    assert done.status["9"] == done.status["10"] == "stopped"
    assert done.reasons["9"].startswith("10th of 10 at step 100")
    assert done.reasons["29"].startswith("30th of 30 at step 50")
    assert done.reasons["0"] == ""


def test_failures_in_a_replay() -> None:
    steps = (0, 8, 10, 16, 20, 32, 40)
    curves = curves_of(
        steps,
        {
            "nan": (4, 1, math.nan, 1, 1, 1, 1),
            "short": (4, 1, 1, 1),
            "high": (4, 1, 1, 20.5, 1, 1, 1),
            "fine": (4, 3, 3, 3, 3, 3, 3),
            "worse": (4, 4, 4, 4, 4, 4, 4),
        },
    )
    growth = GrowthConfig(rule="lag", lag=40, rungs=(10, 20, 40), eval_steps=(8, 16, 32))
    done = replay(growth, curves, pool=(*curves, "absent"))
    assert done.chosen == "fine"
    assert done.steps == {"nan": 8, "short": 16, "high": 10, "fine": 40, "worse": 40, "absent": 0}
    assert done.reasons == {
        "nan": "validation loss nan at step 10",
        "short": "no validation loss at step 40",
        "high": "validation loss 20.5 is above growth.max_loss 20.0 at step 16",
        "fine": "",
        "worse": "",
        "absent": "no validation loss at step 40",
    }
    assert done.status == {
        id_: "failed" if reason else "finished" for id_, reason in done.reasons.items()
    }


def test_a_stopped_candidate_is_not_asked_for_more() -> None:
    curves = curves_of((0, 10, 20, 40), {"a": (4, 2, 2, 2), "b": (4, 3)})
    done = replay(UNGUARDED, curves, pool=("a", "b"))
    assert done.status == {"a": "finished", "b": "stopped"}
    assert done.steps == {"a": 40, "b": 10}


def test_nobody_left_names_the_reasons() -> None:
    curves = curves_of((0, 40), {"a": (1, math.nan), "b": (1, math.inf)})
    with pytest.raises(RunError, match="none of the 2 candidates") as error:
        replay(GrowthConfig(rule="lag", lag=40), curves, pool=("a", "b"))
    assert "a: validation loss nan at step 40" in str(error.value)
    assert "b: validation loss inf at step 40" in str(error.value)


@pytest.mark.parametrize(
    ("growth", "missing"),
    [
        (GrowthConfig(rule="lag", lag=30), "[30]"),
        (GrowthConfig(rung_value="last", lag=40, rungs=(15, 40), min_rank_correlation=-1), "[15]"),
        (GrowthConfig(rung_value="last", lag=40, rungs=(20, 40)), "[16]"),
        (GrowthConfig(rule="lag", lag=40, rung_value="mean"), "[32]"),
        (GrowthConfig(rule="lag", lag="auto", rungs=(10, 20, 40)), "[8]"),
    ],
)
def test_missing_evaluations_are_named(growth: GrowthConfig, missing: str) -> None:
    curves = curves_of((0, 10, 20, 40), {id_: (4, 3, 2, 1) for id_ in "abc"})
    with pytest.raises(RunError) as error:
        replay(growth, curves, pool="abc")
    assert missing in str(error.value)
    assert "[0, 10, 20, 40]" in str(error.value)


def test_missing_averages_are_named() -> None:
    curves = curves_of((0, 40), {"a": (4, 3)})
    growth = GrowthConfig(rule="lag", lag=40, rung_value="ema")
    with pytest.raises(RunError, match="averaged weights at step 40"):
        replay(growth, curves, pool=("a",))


def test_the_value_decides() -> None:
    curves = {
        "last": [Evaluation(32, 9.0), Evaluation(40, 1.0, (), 5.0)],
        "mean": [Evaluation(32, 2.0), Evaluation(40, 2.0, (), 5.0)],
        "ema": [Evaluation(32, 9.0), Evaluation(40, 3.0, (), 4.0)],
    }
    for kind in ("last", "mean", "ema"):
        growth = GrowthConfig(rule="lag", lag=40, rung_value=kind)
        assert replay(growth, curves, pool=tuple(curves)).chosen == kind
