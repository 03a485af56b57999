"""The paper's quantities against a second computation, written from their definitions alone."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lag_megatron.report.stats.analysis import on_top
from lag_megatron.selection.analysis import analyse_curves, finished_curves

STEPS = (0, 1, 2, 5, 10, 20, 50)
KEYS = {
    "steps",
    "pearson",
    "spearman",
    "self_spearman",
    "regret",
    "relative_regret",
    "recall",
    "table",
    "base_val_loss",
}


def analysed(curves, **given_):
    nothing = {"lag": 10, "base_val_loss": 4.0, "chosen": None}
    return analyse_curves(curves, **{**nothing, "last_block": [], "random_block": [], **given_})


def curves_of(matrix):
    """Rows are candidates, columns are STEPS."""
    return {f"c{n}": list(zip(STEPS, map(float, row), strict=True)) for n, row in enumerate(matrix)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("decimals", [9, 1], ids=["distinct", "with equal losses"])
def test_equals_the_definitions(seed, decimals):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 12))
    losses = np.round(rng.normal(4, 0.3, (size, len(STEPS))), decimals)
    found = analysed(curves_of(losses))
    final = losses[:, -1]
    oracle = int(np.argmin(final))
    for place in range(len(STEPS)):
        early = losses[:, place]
        assert found["pearson"][place] == pytest.approx(stats.pearsonr(early, final)[0])
        assert found["spearman"][place] == pytest.approx(stats.spearmanr(early, final)[0])
        choice = final[np.argmin(early)]
        assert found["regret"][place] == pytest.approx(choice - final.min())
        assert found["relative_regret"][place] == pytest.approx(
            (choice - final.min()) / (final.max() - final.min())
        )
        for k in range(1, 6):
            smallest = np.argsort(early, kind="stable")[:k]
            assert found["recall"][str(k)][place] == int(oracle in smallest)
        for other in range(len(STEPS)):
            expected = stats.spearmanr(early, losses[:, other])[0]
            assert found["self_spearman"][place][other] == pytest.approx(expected)
    by_lag = int(np.argmin(losses[:, STEPS.index(10)]))
    by_lag0 = int(np.argmin(losses[:, 0]))
    for policy, choice in (("oracle", oracle), ("lag@10", by_lag), ("lag@0", by_lag0)):
        row = found["table"][policy]
        assert row["id"] == f"c{choice}"
        assert row["final_loss"] == final[choice]
        assert row["regret"] == pytest.approx(final[choice] - final.min())
        spread = final.max() - final.min()
        assert row["relative_regret"] == pytest.approx((final[choice] - final.min()) / spread)


@given(
    st.lists(
        st.lists(st.sampled_from([3.5, 3.75, 4.0, 4.5, 4.625]), min_size=7, max_size=7),
        min_size=3,
        max_size=5,
    )
)
def test_properties(matrix):
    found = analysed(curves_of(matrix))
    assert set(found) == KEYS
    json.dumps(found, allow_nan=False)
    assert found["regret"][-1] == found["relative_regret"][-1] == 0
    assert all(0 <= share <= 1 for share in found["relative_regret"])
    assert all(regret >= 0 for regret in found["regret"])
    assert found["recall"][str(len(matrix))] == [1] * len(STEPS)
    assert [hits[-1] for hits in found["recall"].values()] == [1] * 5
    for fewer, more in zip("1234", "2345", strict=True):
        pairs = zip(found["recall"][fewer], found["recall"][more], strict=True)
        assert all(a <= b for a, b in pairs)
    heat = found["self_spearman"]
    for i in range(len(STEPS)):
        assert heat[i][i] is None or heat[i][i] == pytest.approx(1)
        assert [heat[j][i] for j in range(len(STEPS))] == heat[i]
    assert [row[-1] for row in heat] == found["spearman"]
    assert all(r is None or -1 <= r <= 1 for r in (*found["pearson"], *found["spearman"]))


def test_a_hand_computed_case():
    curves = {
        "a": [(0, 1.0), (10, 3.0), (20, 3.0)],
        "b": [(0, 2.0), (10, 2.0), (20, 1.0)],
        "c": [(0, 3.0), (10, 1.0), (20, 1.5)],
    }
    found = analysed(curves, chosen="b", last_block=["b"], random_block=["gone"])
    assert found["steps"] == [0, 10, 20]
    assert found["regret"] == [2.0, 0.5, 0.0]
    assert found["relative_regret"] == [1.0, 0.25, 0.0]
    assert found["recall"]["1"] == [0, 0, 1]
    assert found["recall"]["2"] == [1, 1, 1]
    assert found["spearman"] == pytest.approx([-0.5, 0.5, 1.0])
    b = {"id": "b", "final_loss": 1.0, "regret": 0.0, "relative_regret": 0.0}
    c = {"id": "c", "final_loss": 1.5, "regret": 0.5, "relative_regret": 0.25}
    a = {"id": "a", "final_loss": 3.0, "regret": 2.0, "relative_regret": 1.0}
    gone = {"id": "gone", "final_loss": None, "regret": None, "relative_regret": None}
    expected = {"oracle": b, "lag@10": c, "lag@0": a, "last_block": b, "random_block": gone}
    assert found["table"] == {**expected, "chosen": b}
    assert "chosen" not in analysed(curves, chosen="c")["table"]


def test_only_steps_and_candidates_that_all_share():
    curves = {
        "a": [(0, 1.0), (5, 1.0), (10, 1.0), (20, 1.0)],
        "stopped": [(0, 0.5), (5, 9.0)],
        "b": [(0, 2.0), (10, math.nan), (20, 2.0)],
        "c": [(0, 3.0), (10, 3.0), (20, 3.0)],
        "diverged": [(0, 0.6), (10, 4.0), (20, math.inf)],
    }
    assert set(finished_curves(curves)) == {"a", "b", "c"}
    found = analysed(curves)
    assert found["steps"] == [0, 20]
    assert found["spearman"] == pytest.approx([1.0, 1.0])
    stopped = {"id": "stopped", "final_loss": None, "regret": None, "relative_regret": None}
    assert found["table"]["lag@0"] == stopped
    assert found["table"]["lag@10"]["id"] == "a"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_fewer_than_three_give_nothing(number):
    found = analysed({f"c{n}": [(0, 1.0 + n), (10, 2.0)] for n in range(number)})
    steps = [0, 10] if number else []
    assert found["steps"] == steps
    nothing = [None] * len(steps)
    for key in ("pearson", "spearman", "regret", "relative_regret"):
        assert found[key] == nothing
    assert found["recall"] == {str(k): nothing for k in range(1, 6)}
    assert found["self_spearman"] == [nothing] * len(steps)
    assert set(found["table"].values()) == {None}


def test_equal_losses_correlate_with_nothing():
    found = analysed({n: [(0, float(ord(n))), (10, 2.0), (20, 2.0)] for n in "abc"})
    assert found["spearman"] == found["pearson"] == [None] * 3
    assert found["relative_regret"] == [0.0] * 3
    assert found["self_spearman"][0][0] == pytest.approx(1)


def layers(*names, scale=1.0):
    """``"1"`` is an old layer, ``"1*"`` a copy of it, ``"R"`` a fresh one."""
    found = []
    for name in names:
        new = name.endswith("*") or name == "R"
        init = "random" if name == "R" else "duplicate"
        source = 0 if name == "R" else int(name.rstrip("*")) - 1
        found.append({"source": source, "new": new, "init": init, "scale": scale if new else 1.0})
    return found


def test_what_stands_on_top():
    pool = [
        {"id": "interleaved", "layer_map": layers("1", "2", "3", "3*", "4", "4*")},
        {"id": "half", "layer_map": layers("1", "2", "3", "4", "3*", "4*", scale=0.5)},
        {"id": "last", "layer_map": layers("1", "2", "3", "4", "3*", "4*")},
        {"id": "others", "layer_map": layers("1", "2", "3", "4", "1*", "2*")},
        {"id": "swapped", "layer_map": layers("1", "2", "3", "4", "4*", "3*")},
        {"id": "fresh", "layer_map": layers("1", "2", "3", "4", "R", "R")},
        {"id": "below", "layer_map": layers("R", "R", "1", "2", "3", "4")},
        {"id": "mixed", "layer_map": layers("1", "2", "3", "4", "R", "4*")},
        {"id": "unknown"},
    ]
    assert on_top(pool, init="duplicate") == ["last", "half"]
    assert on_top(pool, init="random") == ["fresh"]
    assert on_top([], init="random") == []
