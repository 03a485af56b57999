"""The learning rate of every step, and which of its settings contradict each other."""

import math
from typing import Any

import pytest

from lag_megatron.config import parse_config
from lag_megatron.errors import ConfigError
from lag_megatron.planning.lr_plot import plot_lr
from lag_megatron.planning.lr_schedule import rate_at

MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "seq_length": 8,
}
GROWTH = {"rule": "lag", "lag": 1}


def config(stages: Any = 10, *, lr: float = 1.0, optimizer: Any = None, **schedule: Any) -> Any:
    stages = [{"steps": stages}] if isinstance(stages, int) else stages
    return parse_config({
        "model": MODEL,
        "stages": stages,
        "growth": GROWTH,
        "optimizer": {"lr": lr, "schedule": schedule, **(optimizer or {})},
        "parallel": {"zero_stage": 0},
    })  # fmt: skip


def rates(settings: Any) -> list[float]:
    return [rate_at(step, settings).lr for step in range(settings.total_steps)]


@pytest.mark.parametrize(
    "name", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
)  # fmt: skip
def test_all_rise_linearly_to_the_full_rate(name: str) -> None:
    assert rates(config(40, name=name, warmup_steps=4))[:4] == [0.25, 0.5, 0.75, 1]


def test_constant() -> None:
    assert rates(config(6)) == [1] * 6


def test_linear_and_cosine_fall_to_the_minimum_and_stay() -> None:
    shared = {"warmup_steps": 2, "decay_steps": 10, "min_lr": 0.1}
    linear = rates(config(14, name="linear", **shared))
    cosine = rates(config(14, name="cosine", **shared))
    for found in (linear, cosine):
        assert found[2] == 1
        assert found[6] == pytest.approx(0.55)
        assert found[9] > 0.1
        assert found[10:] == [0.1] * 4
    assert linear[4] == pytest.approx(1 - 0.9 / 4)
    assert cosine[4] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_decay_ends_with_the_run_by_default() -> None:
    assert rate_at(5, config(20, name="cosine")).lr == pytest.approx(
        (1 + math.cos(math.pi / 4)) / 2
    )
    assert rates(config(4, name="linear")) == [1, 0.75, 0.5, 0.25]


def test_cosine_with_a_warm_up_longer_than_the_run() -> None:
    assert rate_at(4, config(5, name="cosine", warmup_steps=10)).lr == 0.5


def test_inverse_square_root_as_in_the_paper() -> None:
    found = rates(config(50, lr=0.4, name="inverse_sqrt", warmup_steps=4, min_lr=0.15))
    for step, lr in enumerate(found, start=1):  # Vaswani et al. 2017, equation 3, for d = 1/0.64
        paper = 0.8 * min(step**-0.5, step * 4**-1.5)
        assert lr == pytest.approx(max(paper, 0.15) if step > 4 else paper)


def test_warm_up_stable_decay() -> None:
    settings = {"name": "wsd", "warmup_steps": 2, "decay_steps": 10, "min_lr": 0.2}
    given = rates(config(12, stable_steps=6, **settings))
    assert given == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])
    default = rates(config(12, **settings))
    assert default == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.6, 0.2, 0.2])


def test_a_stage_goes_on_from_its_position() -> None:
    stages = [{"steps": 6}, {"steps": 3, "schedule_position": 2}, {"steps": 2}]
    found = rates(config(stages, name="linear", decay_steps=10))
    assert found == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.8, 0.7, 0.6, 0.5, 0.4])


def test_decay_reaches_over_rewinds() -> None:
    stages = [{"steps": 6}, {"steps": 5, "schedule_position": 3}]
    found = rates(config(stages, name="linear"))
    assert found[:2] == [1, 7 / 8]
    assert found[6] == found[3] == 5 / 8
    assert found[-1] == 1 / 8


GROWING = [{"steps": 3}, {"steps": 2, "num_layers": 3}, {"steps": 3}, {"steps": 2, "num_layers": 4}]


def test_the_rate_rises_again_after_each_growth() -> None:
    every = config(GROWING, growth_warmup_steps=4)
    quarters = [0.25, 0.5, 0.75, 1, 1]
    assert rates(every) == [1, 1, 1, *quarters, 0.25, 0.5]
    assert {rate_at(step, every).new_layers for step in range(10)} == {1}
    fresh = config(GROWING, growth_warmup_steps=4, growth_warmup="new")
    assert rates(fresh) == [1] * 10
    found = [rate_at(step, fresh).new_layers for step in range(10)]
    assert found == [1, 1, 1, *quarters, 0.25, 0.5]


def test_a_rise_without_growth_is_none() -> None:
    assert rates(config([{"steps": 3}, {"steps": 2}], growth_warmup_steps=4)) == [1] * 5


@pytest.mark.parametrize(
    ("stages", "schedule", "part"),
    [
        (9, {"warmup_steps": 2, "decay_steps": 5}, "decay_steps: has no effect.*'constant'"),
        (9, {"min_lr": 0.1}, "min_lr: has no effect with the schedule 'constant'"),
        (9, {"name": "linear", "stable_steps": 5}, "stable_steps: has no effect.*'linear'"),
        (9, {"name": "inverse_sqrt"}, "warmup_steps: inverse_sqrt falls as"),
        (9, {"name": "wsd", "decay_steps": 6, "stable_steps": 6}, "stable_steps: 6.*decay_steps 6"),
        (9, {"name": "wsd", "stable_steps": 9}, "stable_steps: 9 .* the run's end at 9"),
        (9, {"name": "wsd", "warmup_steps": 4, "stable_steps": 3}, "stable_steps: 3 must not be"),
        (
            9,
            {"name": "cosine", "warmup_steps": 4, "decay_steps": 4},
            "decay_steps: 4 must be after",
        ),
        (9, {"growth_warmup_steps": -1}, "growth_warmup_steps: must be finite and not negative"),
        ([{"steps": 9, "schedule_position": -1}], {}, "stages.0.schedule_position: must be finite"),
        (
            [{"steps": 9}, {"steps": 2, "schedule_position": 6}],
            {"name": "linear", "decay_steps": 6},
            "stages.1.schedule_position: at 6 the schedule has ended .decay_steps 6. with min_lr 0",
        ),
    ],
)
def test_contradictions_are_refused(stages: Any, schedule: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        config(stages, **schedule)


def test_a_position_after_the_decay_is_taken_where_something_is_left() -> None:
    stages = [{"steps": 9}, {"steps": 2, "schedule_position": 20}]
    assert rates(config(stages, name="linear", decay_steps=6, min_lr=0.5))[-2:] == [0.5, 0.5]


def test_adafactor_is_refused_where_it_would_not_be_factored() -> None:
    tree = {"model": MODEL, "stages": [{"steps": 1}], "optimizer": {"name": "adafactor"}}
    with pytest.raises(ConfigError, match=r"parallel.zero_stage 1\) cuts parameters into flat"):
        parse_config(tree)
    with pytest.raises(ConfigError, match=r"over whole matrices, and with parallel\.tensor 2"):
        parse_config(tree | {"parallel": {"zero_stage": 0, "tensor": 2}})
    with pytest.raises(ConfigError, match=r"optimizer\.betas: is adamw's and has no effect"):
        config(optimizer={"name": "adafactor", "betas": [0.8, 0.9]})
    assert config(optimizer={"name": "adafactor"}).optimizer.name == "adafactor"


def test_the_curve_tells_rewinds_and_rises() -> None:
    stages = [{"steps": 40}, {"steps": 32, "num_layers": 3, "schedule_position": 20}]
    text = "\n".join(plot_lr(config(stages, growth_warmup_steps=8, growth_warmup="new")))
    shown = " ".join(text.split())
    assert "stage 1: the schedule goes on from position 20 instead of 40; the rate of new" in shown
    top = text.splitlines()[0].partition("|")[2]
    assert top == "#" * 40 + "." * 7 + "#" * 25
    plain = "\n".join(plot_lr(config(40)))
    assert "goes on from" not in plain
