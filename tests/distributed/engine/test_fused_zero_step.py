"""The step in one pass leaves what DeepSpeed's own step leaves, at every stage of ZeRO."""

import dataclasses
import math

import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks, sparing

STEPS = 4
QUICK = [
    *((1, "fp32", 2, 1), (1, "bf16", 4, 2), (2, "bf16", 2, 1), (3, "fp32", 2, 1)),
    *((1, "bf16", 1, 1), (2, "fp32", 1, 1)),  # no reduction
]


def masters_after(config, *, spoil=False):
    """On each rank: its masters, moments and weights after some steps, and the gradient norms."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    layers = config.model.num_layers
    engine = Engine(config, world, num_layers=layers, vocab_size=PICO_VOCABULARY)
    norms = []
    for step in range(STEPS):
        batches = random_batches(config, world, step)
        if spoil and step == STEPS - 1:
            batches[0]["loss_mask"][0, 0] = math.nan
        norms.append(engine.train_step(batches, step=step, lr=1e-2).grad_norm)
        if spoil and step == STEPS - 2:
            before = state_of(engine)
    found = state_of(engine)
    stop_world()
    return (before, found, norms) if spoil else (found, norms)


def state_of(engine):
    optimizer = engine.state.torch_optimizer
    masters = [master.detach().clone() for master in engine.state.masters]
    moments = [
        value.clone() for state in optimizer.state.values() for _, value in sorted(state.items())
    ]
    weights = [p.detach().clone() for p in engine.module.parameters()]
    return masters + moments + weights


def config_of(stage, precision, tensor, grad_clip, *, one_pass):
    config = pico_config(zero_stage=stage, precision=precision, tensor=tensor)
    optimizer = dataclasses.replace(config.optimizer, grad_clip=grad_clip, one_pass=one_pass)
    return dataclasses.replace(config, optimizer=optimizer)


@pytest.mark.parametrize("grad_clip", [1e6, 0.3])
@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "tensor"),
    sparing(
        [
            (stage, precision, ranks, tensor)
            for stage in (1, 2, 3)
            for precision in ("fp32", "bf16")
            for ranks, tensor in ((1, 1), (2, 1), (2, 2), (4, 2))
            if not (stage == 3 and tensor == 2)
        ],
        slow=lambda way: way not in QUICK,
    ),
)
def test_the_state_is_deepspeeds(stage, precision, ranks, tensor, grad_clip):
    ways = [
        run_ranks(
            masters_after, ranks, config_of(stage, precision, tensor, grad_clip, one_pass=one_pass)
        )
        for one_pass in (True, False)
    ]
    for (ours, our_norms), (theirs, their_norms) in zip(*ways, strict=True):
        assert our_norms == pytest.approx(their_norms, rel=1e-6)
        clipped = any(norm > grad_clip for norm in our_norms)
        assert clipped == (grad_clip < 1)
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype is other.dtype
            # The rate is 1e-2; a norm that is rounded otherwise tells where gradients are noise.
            rounding = {"rtol": 1e-5, "atol": 1e-5 if clipped else 1e-7}
            if one.dtype is torch.bfloat16:
                rounding = {"rtol": 8e-3, "atol": 1e-5}
            torch.testing.assert_close(one, other, **rounding)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(stage):
    config = config_of(stage, "fp32", 1, 1.0, one_pass=True)
    for before, after, norms in run_ranks(spoilt, 2, config):
        assert not math.isfinite(norms[-1])
        assert all(math.isfinite(norm) for norm in norms[:-1])
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)


def spoilt(config):
    return masters_after(config, spoil=True)
