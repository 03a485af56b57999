"""The rules at one rung: who goes on, what the guard vetoes, and who can still win."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judging import GUARDED, UNGUARDED, curves_of

from lag_megatron.config import GrowthConfig
from lag_megatron.selection import Evaluation, can_still_win, judge


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
