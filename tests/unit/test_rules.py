"""Rungs, rules, the phase transition and replays, on small pools and by properties."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from lag_megatron.config import GrowthConfig
from lag_megatron.errors import RunError
from lag_megatron.selection import (
    MARGIN,
    Evaluation,
    Replay,
    can_still_win,
    judge,
    phase_transition,
    replay,
    rung_batches,
    rung_value,
    self_correlation,
)

Curves = dict[str, list[Evaluation]]
UNGUARDED = GrowthConfig(
    rung_value="last", lag=40, rungs=(10, 20, 40), eta=2, min_rank_correlation=-1
)
GUARDED = GrowthConfig(rung_value="last", lag=40, rungs=(20, 40), eta=2, min_rank_correlation=0.8)


def curves_of(steps: Sequence[int], losses: Mapping[str, Sequence[float]]) -> Curves:
    """Curves shorter than ``steps`` end early."""
    return {
        id_: [Evaluation(step, loss) for step, loss in zip(steps, values, strict=False)]
        for id_, values in losses.items()
    }


# --- values -------------------------------------------------------------------------------------


def test_a_row_of_the_probe_file() -> None:
    row = {"step": 5, "val_loss": 2, "val_loss_batches": [1, 3], "lr": 0.1}
    assert Evaluation.of_row(row) == Evaluation(5, 2.0, (1.0, 3.0))
    averaged = {**row, "ema_val_loss": 1.5, "ema_val_loss_batches": [1, 2]}
    assert Evaluation.of_row(averaged) == Evaluation(5, 2.0, (1.0, 3.0), 1.5, (1.0, 2.0))
    assert math.isnan(Evaluation.of_row({"step": 5, "val_loss": None}).loss)


def test_values_of_a_rung() -> None:
    curve = [
        Evaluation(0, 9.0, (8.0, 10.0)),
        Evaluation(5, 4.0, (3.0, 5.0), 6.0, (5.0, 7.0)),
        Evaluation(8, 3.0, (2.0, 4.0), 5.0, (4.0, 6.0)),
        Evaluation(10, 1.0, (0.5, 1.5), 3.0, (2.0, 4.0)),
        Evaluation(12, 0.1),
    ]
    assert rung_value("last", curve, 10) == 1
    assert rung_value("mean", curve, 10) == 2  # (5, 10]: not the one at 5, nor that at 12
    assert rung_value("ema", curve, 10) == 3
    assert rung_value("ema", curve, 12) is None
    assert rung_value("last", curve, 9) is None
    assert rung_value("mean", curve, 9) is None  # though 5 and 8 lie in the window
    assert rung_value("mean", curve, 0) == 9
    assert rung_batches("last", curve, 10) == (0.5, 1.5)
    assert rung_batches("mean", curve, 10) == (1.25, 2.75)
    assert rung_batches("ema", curve, 10) == (2.0, 4.0)
    assert rung_batches("mean", curve, 12) == ()  # 12 has no batches


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_values_are_finite(loss: float) -> None:
    curve = [Evaluation(8, loss, (), loss), Evaluation(10, 1.0, (), 1.0)]
    assert rung_value("mean", curve, 10) is None
    assert rung_value("last", curve, 8) is None
    assert rung_value("ema", curve, 8) is None
    assert rung_value("last", curve, 10) == 1


# --- rules --------------------------------------------------------------------------------------


def test_lag_decides_at_its_only_rung() -> None:
    growth = GrowthConfig(rule="lag", lag=10)
    verdict = judge(growth, 10, curves_of((0, 10), {"a": (1, 3), "b": (9, 2)}), alive=("a", "b"))
    assert verdict.goes_on == ("b", "a")
    assert (verdict.decided, verdict.stopped, verdict.transition) == (True, {}, None)


def test_halving_by_hand() -> None:
    losses = {"a": (9, 5.0), "b": (8, 4.0), "c": (7, 3.391), "d": (6, 3.412), "e": (5, 3.1)}
    curves = curves_of((0, 10), losses)
    verdict = judge(UNGUARDED, 10, curves, alive=tuple(losses))
    assert verdict.goes_on == ("e", "c", "d")  # the half, rounded up
    assert not verdict.decided
    assert verdict.stopped == {
        "b": "4th of 5 at step 10: 4.0000 against 3.4120 of the last that went on",
        "a": "5th of 5 at step 10: 5.0000 against 3.4120 of the last that went on",
    }


def test_equal_values_go_to_the_earlier_in_the_pool() -> None:
    curves = curves_of((0, 10), {"a": (1, 2.0), "b": (1, 2.0), "c": (1, 2.0), "d": (1, 2.0)})
    assert judge(UNGUARDED, 10, curves, alive=("b", "a", "d", "c")).goes_on == ("b", "a")


def test_the_last_rung_decides_with_a_whole_ranking() -> None:
    curves = curves_of((0, 40), {"a": (1, 3), "b": (2, 2), "c": (3, 1)})
    verdict = judge(UNGUARDED, 40, curves, alive=("a", "b", "c"))
    assert (verdict.goes_on, verdict.decided, verdict.stopped) == (("c", "b", "a"), True, {})


def test_a_single_candidate_goes_on() -> None:
    verdict = judge(UNGUARDED, 10, curves_of((0, 10), {"a": (1, 2)}), alive=("a",))
    assert (verdict.goes_on, verdict.decided) == (("a",), False)


STEPS = (0, 16, 20)
ALIKE = {"a": (4, 4, 4), "b": (3, 3, 3), "c": (2, 2, 2), "d": (1, 1, 1)}
SWAPPED = {"a": (4, 1, 4), "b": (3, 2, 3), "c": (2, 3, 2), "d": (1, 4, 1)}


def test_the_guard_vetoes() -> None:
    stable = judge(GUARDED, 20, curves_of(STEPS, ALIKE), alive=tuple(ALIKE))
    assert stable.rank_correlation == pytest.approx(1)
    assert stable.goes_on == ("d", "c")
    vetoed = judge(GUARDED, 20, curves_of(STEPS, SWAPPED), alive=tuple(SWAPPED))
    assert vetoed.rank_correlation == pytest.approx(-1)
    assert vetoed.goes_on == ("d", "c", "b", "a")
    assert vetoed.stopped == {}
    assert not vetoed.decided


def test_the_guard_compares_the_candidates_left() -> None:
    verdict = judge(GUARDED, 20, curves_of(STEPS, {**SWAPPED, **ALIKE}), alive=("b", "c", "d"))
    assert verdict.rank_correlation == pytest.approx(1)


def test_a_bar_of_one_is_passed_by_equal_rankings() -> None:
    growth = GrowthConfig(rung_value="last", lag=40, rungs=(20, 40), eta=2, min_rank_correlation=1)
    losses = {str(n): (0, 1 + n / 7, 1 + n / 3) for n in range(23)}
    assert len(judge(growth, 20, curves_of(STEPS, losses), alive=tuple(losses)).goes_on) == 12


@pytest.mark.parametrize("losses", [{"a": (2, 2, 2), "b": (1, 1, 1)}, dict.fromkeys("abcd", STEPS)])
def test_without_a_correlation_the_guard_lets_everybody_go_on(losses: dict) -> None:
    curves = curves_of(STEPS, losses)
    verdict = judge(GUARDED, 20, curves, alive=tuple(losses))
    assert verdict.rank_correlation is None
    assert set(verdict.goes_on) == set(losses)
    unguarded = GrowthConfig(
        rung_value="last", lag=40, rungs=(20, 40), eta=2, min_rank_correlation=-1
    )
    assert len(judge(unguarded, 20, curves, alive=tuple(losses)).goes_on) == len(losses) // 2


def test_a_rung_without_an_evaluation_before_it_has_no_guard() -> None:
    growth = GrowthConfig(lag=4, rungs=(2, 4), eta=2)  # round(0.8 * 2) is 2 itself
    verdict = judge(growth, 2, curves_of((0, 2), {k: v[:2] for k, v in ALIKE.items()}), alive="abc")
    assert verdict.rank_correlation is None
    assert verdict.goes_on == ("c", "b", "a")


def test_the_guard_uses_the_value_that_is_compared() -> None:
    growth = GrowthConfig(lag=40, rungs=(20, 40), eta=2, rung_value="ema")
    curves = {
        id_: [Evaluation(16, n, (), 1.0 + n), Evaluation(20, 5.0 - n, (), 2.0 + n)]
        for n, id_ in enumerate("abcd")
    }
    assert judge(growth, 20, curves, alive="abcd").rank_correlation == pytest.approx(1)
    unaveraged = {
        id_: [Evaluation(16, n), Evaluation(20, 0.0, (), 2.0 - n)] for n, id_ in enumerate("abcd")
    }
    assert judge(growth, 20, unaveraged, alive="abcd").rank_correlation == pytest.approx(-1)


def test_later_evaluations_are_not_looked_at() -> None:
    """After a crash the curves on the disk may be longer than the rung that is judged."""
    longer = {id_: [*c, Evaluation(32, -9), Evaluation(40, 0)] for id_, c in
              curves_of(STEPS, ALIKE).items()}  # fmt: skip
    short = judge(GUARDED, 20, curves_of(STEPS, ALIKE), alive=tuple(ALIKE))
    assert judge(GUARDED, 20, longer, alive=tuple(ALIKE)) == short


def test_a_candidate_without_a_value_is_the_callers_mistake() -> None:
    with pytest.raises(AssertionError, match="no value at rung 10"):
        judge(UNGUARDED, 10, curves_of((0, 10), {"a": (1, math.nan)}), alive=("a",))


# --- who can still win --------------------------------------------------------------------------


def test_at_the_last_rung_only_the_best_so_far_can_win() -> None:
    pool = ("a", "b", "c")
    for growth in (UNGUARDED, GUARDED, GrowthConfig(rule="lag", lag=40)):
        assert can_still_win(growth, 40, {"b": 2.0}, "b", pool=pool, alive=3)
        assert not can_still_win(growth, 40, {"b": 2.0, "c": 2.0}, "c", pool=pool, alive=3)
        assert can_still_win(growth, 40, {"b": 2.0, "a": 2.0}, "a", pool=pool, alive=3)


def test_before_the_last_rung_the_places_decide_unless_all_may_go_on() -> None:
    pool, values = tuple("abcde"), {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert can_still_win(UNGUARDED, 10, values, "c", pool=pool, alive=5)
    assert not can_still_win(UNGUARDED, 10, values, "d", pool=pool, alive=5)
    assert not can_still_win(UNGUARDED, 10, values, "c", pool=pool, alive=4)
    assert can_still_win(GUARDED, 20, values, "d", pool=pool, alive=5)
    auto = GrowthConfig(
        rung_value="last", lag="auto", rungs=(10, 20, 40), min_rank_correlation=-1, eta=2
    )
    assert can_still_win(auto, 20, values, "d", pool=pool, alive=5)
    assert not can_still_win(auto, 40, values, "d", pool=pool, alive=5)


tables = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=8)


@given(tables, st.randoms(use_true_random=False), st.integers(2, 4), st.sampled_from([10, 40]))
def test_whoever_is_written_off_does_not_go_on(values, random, eta, rung) -> None:
    """In whatever order candidates arrive."""
    growth = GrowthConfig(
        rung_value="last", lag=40, rungs=(10, 40), eta=eta, min_rank_correlation=-1
    )
    table = {str(n): value for n, value in enumerate(values)}
    arrivals = list(table)
    random.shuffle(arrivals)
    written_off, here = set(), {}
    for id_ in arrivals:
        here[id_] = table[id_]
        if not can_still_win(growth, rung, here, id_, pool=tuple(table), alive=len(table)):
            written_off.add(id_)
    curves = {id_: [Evaluation(rung, loss)] for id_, loss in table.items()}
    verdict = judge(growth, rung, curves, alive=tuple(table))
    needed = verdict.goes_on[:1] if verdict.decided else verdict.goes_on
    assert written_off.isdisjoint(needed)
    final = arrivals[-1]  # all are here, so that nothing is unknown any more
    assert (final in written_off) == (final not in needed)


# --- phase transition ---------------------------------------------------------------------------


def test_self_correlation_is_scipys() -> None:
    rng = np.random.default_rng(3)
    losses = rng.normal(size=(9, 4)).round(1)  # rounded: equal losses occur
    curves = curves_of((0, 5, 7, 9), {str(n): row for n, row in enumerate(losses.tolist())})
    assert np.allclose(self_correlation(curves, (0, 5, 7, 9)), spearmanr(losses).statistic)
    assert self_correlation(curves, (0, 6))[0] == [pytest.approx(1), None]


def planted(
    transition: int, steps: Sequence[int], *, candidates: int = 20, noise: float = 0.15, seed: int
) -> Curves:
    """Before the transition the ranking is the reverse of the one from it on, with noise.

    Losses fall on the way, and are candidate * spread; the paper's early ranking is
    anti-correlated with the late one too.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(candidates)
    curves: Curves = {str(n): [] for n in range(candidates)}
    for step in steps:
        level = 2 + 3 / (1 + step)
        ranks = order if step >= transition else -order
        spread = ranks / candidates + noise * rng.normal(size=candidates)
        for n, value in enumerate(spread):
            curves[str(n)].append(Evaluation(step, level + 0.05 * value))
    return curves


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


# --- replay -------------------------------------------------------------------------------------

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


# --- properties ---------------------------------------------------------------------------------

EVALUATIONS = (0, 8, 10, 16, 20, 32, 40)
numbers = st.one_of(
    st.integers(0, 6).map(float), st.floats(0, 10), st.sampled_from([math.nan, math.inf, 99.0])
)


def tables_of(values: st.SearchStrategy) -> st.SearchStrategy:
    """One to seven candidates' losses."""
    return st.lists(st.lists(values, min_size=7, max_size=7), min_size=1, max_size=7)


recordings = tables_of(numbers)
growths = st.builds(
    GrowthConfig,
    rule=st.sampled_from(["lag", "halving"]),
    lag=st.sampled_from([40, "auto"]),
    rungs=st.just((10, 20, 40)),
    eta=st.sampled_from([2, 3, 1000]),
    min_rank_correlation=st.sampled_from([-1.0, 0.0, 0.8]),
    rung_value=st.sampled_from(["last", "mean"]),
)


def attempt(growth: GrowthConfig, curves: Curves, pool: Sequence[str]) -> Replay | None:
    try:
        return replay(growth, curves, pool=pool)
    except RunError:
        return None


def recorded(losses: list[list[float]]) -> Curves:
    return curves_of(EVALUATIONS, {f"c{n}": values for n, values in enumerate(losses)})


@given(growths, recordings)
def test_a_replay_is_consistent(growth: GrowthConfig, losses: list[list[float]]) -> None:
    curves = recorded(losses)
    done = attempt(growth, curves, tuple(curves))
    assume(done is not None)
    assert done.status[done.chosen] == "finished"
    assert done.steps[done.chosen] == done.lag == done.verdicts[-1].rung
    assert done.probe_steps <= len(curves) * done.lag
    assert [v.decided for v in done.verdicts] == [False] * (len(done.verdicts) - 1) + [True]
    for id_ in curves:
        assert (done.reasons[id_] == "") == (done.status[id_] == "finished")
        assert (done.steps[id_] == done.lag) == (done.status[id_] == "finished")
    if growth.rule == "lag":
        assert "stopped" not in done.status.values()


@given(recordings)
def test_lag_is_the_lowest_loss_at_the_lag(losses: list[list[float]]) -> None:
    curves = recorded(losses)
    done = attempt(GrowthConfig(rule="lag", lag=40), curves, tuple(curves))
    # What is evaluated is step 0 and the lag; np.argmin takes the first of equals.
    table = np.array(losses)[:, [0, -1]]
    fails = ~((table <= 20).all(axis=1))
    if fails.all():
        assert done is None
    else:
        assert done.chosen == f"c{np.where(fails, np.inf, table[:, 1]).argmin()}"


@given(tables_of(st.integers(0, 6).map(float)), st.sampled_from([2, 3, 1000]))
def test_halving_is_cutting_a_sorted_table(losses: list[list[float]], eta: int) -> None:
    """An independent computation, guard off, over candidates that do not fail."""
    table = np.array(losses)
    growth = GrowthConfig(
        rung_value="last", lag=40, rungs=(10, 20, 40), eta=eta, min_rank_correlation=-1
    )
    left, steps = np.arange(len(table)), np.full(len(table), 40)
    for column, rung in ((2, 10), (4, 20)):
        order = left[np.argsort(table[left, column], kind="stable")]
        places = math.ceil(len(left) / eta)
        steps[order[places:]] = rung
        left = np.sort(order[:places])
    chosen = left[np.argmin(table[left, -1])]
    curves = recorded(losses)
    done = replay(growth, curves, pool=tuple(curves))
    assert done.chosen == f"c{chosen}"
    assert list(done.steps.values()) == steps.tolist()


@given(growths, recordings, st.lists(st.floats(0, 10), min_size=7, max_size=7))
def test_the_best_everywhere_is_chosen(growth, losses, others) -> None:
    curves = recorded([*losses, others])
    best = [
        np.nanmin([v for v in column if math.isfinite(v)]) - 1
        for column in zip(*losses, others, strict=True)
    ]
    curves |= curves_of(EVALUATIONS, {"best": best})
    assert replay(growth, curves, pool=tuple(curves)).chosen == "best"


@given(growths, st.integers(3, 7).flatmap(
    lambda size: st.lists(st.permutations(range(size)), min_size=7, max_size=7)
), st.randoms(use_true_random=False))  # fmt: skip
@settings(max_examples=60)
def test_the_order_of_the_pool_only_settles_equals(growth, columns, random) -> None:
    """Within each evaluation all losses differ; sums of them are exact."""
    table = [[float(2**rank) for rank in column] for column in columns]
    curves = recorded([list(row) for row in zip(*table, strict=True)])
    growth = GrowthConfig(**{**_fields(growth), "max_loss": 1e9, "rung_value": "last"})
    pool = list(curves)
    done = replay(growth, curves, pool=pool)
    random.shuffle(pool)
    again = replay(growth, {id_: curves[id_] for id_ in pool}, pool=pool)
    assert again == done


def _fields(growth: GrowthConfig) -> dict:
    return {name: getattr(growth, name) for name in GrowthConfig.__dataclass_fields__}


@given(growths, recordings)
def test_a_finer_recording_changes_nothing(growth, losses) -> None:
    """Exhaustive runs record more than the rule would have seen."""
    curves = recorded(losses)
    finer = {
        id_: sorted([*curve, Evaluation(12, 0.0), Evaluation(35, math.nan), Evaluation(60, -1.0)],
                    key=lambda e: e.step)
        for id_, curve in curves.items()
    }  # fmt: skip
    assert attempt(growth, finer, tuple(curves)) == attempt(growth, curves, tuple(curves))


@given(growths, recordings)
def test_curves_that_end_with_the_candidates_give_the_same(growth, losses) -> None:
    """What a run with this rule leaves behind replays to what it did."""
    curves = recorded(losses)
    done = attempt(growth, curves, tuple(curves))
    assume(done is not None)
    ended = {id_: [e for e in curve if e.step <= done.steps[id_]] for id_, curve in curves.items()}
    again = replay(growth, ended, pool=tuple(curves))
    assert (again.chosen, again.lag, again.steps) == (done.chosen, done.lag, done.steps)
    assert (again.verdicts, again.status) == (done.verdicts, done.status)
