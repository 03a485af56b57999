"""A configuration that is accepted: what it says of each stage's layers, rungs and evaluations."""

import dataclasses

import pytest
from configuring import config

from lag_megatron.config import GrowthConfig


def test_base_is_accepted_and_frozen():
    run = config()
    assert run.total_steps == 400
    assert [run.layers_of(stage) for stage in (0, 1)] == [4, 6]
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.model.num_layers = 3


def test_a_stage_keeps_the_layers_of_the_one_before():
    run = config("stages=[{steps: 1}, {steps: 300, num_layers: 6}, {steps: 2}, {steps: 3}]")
    assert [run.layers_of(stage) for stage in range(4)] == [4, 6, 6, 6]


def test_a_stage_names_only_what_differs():
    run = config("growth={lag: 50, rungs: [10, 50], pool: {index: 0}}",
                 "stages[1].growth={pool: {block_size: 2}, eval_steps: [5]}")  # fmt: skip
    growth = run.growth_before(1)
    assert (growth.lag, growth.rungs, growth.eval_steps) == (50, (10, 50), (5,))
    assert (growth.pool.index, growth.pool.block_size) == (0, 2)
    assert run.growth.pool.block_size == "all"


def test_a_stage_without_growth_takes_the_global_one():
    run = config("growth.lag=50")
    assert run.growth_before(1) is run.growth


@pytest.mark.parametrize(
    ("settings", "rungs", "evaluations"),
    [
        ({"rule": "lag", "eval_steps": (3, 10)}, (40,), (0, 3, 10, 40)),
        ({"rule": "lag", "rungs": (10, 40)}, (40,), (0, 10, 40)),
        ({"rule": "lag", "rung_value": "mean"}, (40,), (0, 32, 40)),
        ({"rule": "lag", "lag": 0}, (0,), (0,)),
        ({}, (10, 20, 40), (0, 8, 10, 16, 20, 32, 40)),
        ({"rungs": (5, 40)}, (5, 40), (0, 4, 5, 32, 40)),
        ({"lag": 3}, (1, 2, 3), (0, 1, 2, 3)),
        ({"lag": "auto", "rule": "lag", "rungs": (5, 10)}, (5, 10), (0, 4, 5, 8, 10)),
    ],
)
def test_rungs_and_evaluations(settings, rungs, evaluations):
    growth = GrowthConfig(**{"rule": "halving", "lag": 40, **settings})
    assert growth.rung_steps() == rungs
    assert growth.evaluation_steps() == evaluations
