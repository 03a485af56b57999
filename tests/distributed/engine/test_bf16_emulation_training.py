"""Training with bf16 products taken in fp32 follows the curve of those that a CPU emulates."""

import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks

from lag_megatron.model import bf16_emulation


def losses(config, wide):
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    wide_products_answer(wide)
    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(config, world, num_layers=2, vocab_size=PICO_VOCABULARY)
    found = []
    for step in range(4):
        batches = random_batches(config, world, 0)
        found.append(engine.train_step(batches, step=step, lr=1e-2).loss)
    stop_world()
    return found


def wide_products_answer(wide):
    from lag_megatron import model

    for module in (model, model.linear_cross_entropy, bf16_emulation):
        module.needs_bf16_emulation = lambda dtype, device: wide and dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("world", "shape"),
    [(1, {}), (2, {"tensor": 2, "llama": True}), (2, {"zero_stage": 3})],
    ids=["gpt", "llama-tensor2", "gpt-zero3"],
)
def test_training_follows_the_same_curve(world, shape):
    config = pico_config(precision="bf16", **shape)
    curves = [run_ranks(losses, world, config, wide)[0] for wide in (True, False)]
    assert curves[0] != curves[1]  # rounded in other places
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)
    assert curves[0][-1] < curves[0][0]
