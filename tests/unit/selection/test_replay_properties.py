"""What holds of every replay, whatever was recorded."""

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from judging import Curves, curves_of

from lag_megatron.config import GrowthConfig
from lag_megatron.errors import RunError
from lag_megatron.selection import Evaluation, Replay, replay

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
