"""The average of sharded weights, against one taken by hand; looking at it leaves no mark."""

import numpy as np
import pytest
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks, sparing


def watch(config, folder):
    """On each rank: average 4 steps; evaluations of the weights, the averages, and by hand."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.ema import WeightAverage
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(config, world, num_layers=2, vocab_size=PICO_VOCABULARY)
    average = WeightAverage(engine.state)
    first = [m.detach().double().numpy().copy() for m in engine.state.masters]
    for taken in range(1, 5):
        train(engine, config, world, taken)
        average.update(taken)
        weight = 1 - (1 - 1 / taken) ** 7.94  # by Karras et al. 2024, gamma 6.94
        masters = [m.detach().double().numpy() for m in engine.state.masters]
        first = [a + weight * (m - a) for a, m in zip(first, masters, strict=True)]
    batches = [random_batches(config, world, 99)]
    own = engine.evaluate(batches)
    with average.in_place():
        seen = engine.evaluate(batches)
        held = [m.detach().double().numpy().copy() for m in engine.state.masters]
    worst = max(float(np.abs(a - b).max()) for a, b in zip(first, held, strict=True))
    again = engine.evaluate(batches)
    average.save(folder, rank=world.rank, size=world.size)
    other = WeightAverage(engine.state)
    other.load(folder, rank=world.rank, size=world.size)
    with other.in_place():
        loaded = engine.evaluate(batches)
    next_loss = train(engine, config, world, 5)
    stop_world()
    return own, seen, again, loaded, worst, next_loss


def undisturbed(config):
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(config, world, num_layers=2, vocab_size=PICO_VOCABULARY)
    losses = [train(engine, config, world, taken) for taken in range(1, 6)]
    stop_world()
    return losses[-1]


def train(engine, config, world, step):
    batches = random_batches(config, world, step)
    return engine.train_step(batches, step=step, lr=1e-2).loss


@pytest.mark.parametrize(
    ("zero_stage", "precision", "tensor"),
    sparing(
        [(0, "fp32", 1), (1, "fp32", 1), (2, "bf16", 1), (3, "fp32", 1), (1, "fp32", 2),
         (0, "bf16", 1), (3, "bf16", 1)],
        slow=lambda at: at in ((1, "fp32", 1), (0, "bf16", 1), (3, "bf16", 1)),
    ),
)  # fmt: skip
def test_the_average_is_evaluated_and_leaves_no_mark(zero_stage, precision, tensor, tmp_path):
    config = pico_config(zero_stage=zero_stage, precision=precision, tensor=tensor)
    outcomes = run_ranks(watch, 2, config, tmp_path)
    for own, seen, again, loaded, worst, _ in outcomes:
        assert own == again
        assert seen != own
        assert seen == loaded
        assert worst < 1e-6
    assert outcomes[0][-1] == run_ranks(undisturbed, 2, config)[0]
