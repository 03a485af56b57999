"""The value of a rung: from a row of the probe file to what candidates are compared by."""

import math

import pytest

from lag_megatron.selection import Evaluation, rung_batches, rung_value


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
