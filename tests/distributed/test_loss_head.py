"""A decoder's loss in chunks gives Megatron-Core's own loss and gradients, cut or not."""

import contextlib
import dataclasses

import pytest
import torch
from conftest import PICO_VOCABULARY, run_ranks
from families import family_batches, family_config


def both_ways(config, few):
    """On each rank: the loss and all gradients by Megatron's head, then by ours."""
    from lag_megatron.model import build_model, linear_cross_entropy, loss_sums
    from lag_megatron.model.initialize import initialize_weights
    from lag_megatron.model.random_state import seed_everywhere
    from lag_megatron.parallel import start_world, stop_world

    linear_cross_entropy._CHUNK["cpu"] = few
    world = start_world(tensor=config.parallel.tensor)
    seed_everywhere(1)
    layers = config.model.num_layers
    model = build_model(
        config.model, config.parallel, num_layers=layers, vocab_size=PICO_VOCABULARY
    )
    initialize_weights(
        model, config, world, num_layers=layers, gathered=lambda _: contextlib.nullcontext()
    )
    first, second, *_ = family_batches(config, world, 0)
    batch = {name: torch.cat([first[name], second[name]]) for name in first}
    batch["loss_mask"][:, ::3] = 0.0
    del batch["prefix_length"]

    def megatrons():
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return (losses * batch["loss_mask"]).sum()

    found = []
    for way in (megatrons, lambda: loss_sums(model, batch).sum()):
        model.zero_grad(set_to_none=True)
        loss = way()
        (0.25 * loss).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((loss.item(), gradients))
    stop_world()
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}])
def test_loss_and_gradients_are_megatrons(family, parallel):
    config = family_config(family, parallel=parallel)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, dropout=0.0, init_std=0.2)
    )
    ranks = run_ranks(both_ways, config.parallel.tensor, config, 3 * PICO_VOCABULARY)
    for (their_loss, theirs), (our_loss, ours) in ranks:
        assert our_loss == pytest.approx(their_loss, rel=1e-6)
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert gradient.norm() > 0
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
