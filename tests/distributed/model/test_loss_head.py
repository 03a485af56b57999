"""A decoder's loss in chunks gives Megatron-Core's own loss and gradients, cut or not."""

import contextlib
import dataclasses

import pytest
import torch
from conftest import PICO_VOCABULARY, run_ranks
from families import family_batches, family_config


def model_of(config, world):
    """This rank's part of a model, its weights drawn."""
    from lag_megatron.model import build_model
    from lag_megatron.model.initialize import initialize_weights
    from lag_megatron.model.random_state import seed_everywhere

    seed_everywhere(1)
    layers = config.model.num_layers
    model = build_model(
        config.model, config.parallel, num_layers=layers, vocab_size=PICO_VOCABULARY
    )
    initialize_weights(
        model, config, world, num_layers=layers, gathered=lambda _: contextlib.nullcontext()
    )
    return model


def both_ways(config, few):
    """On each rank: the loss and all gradients by Megatron's head, then by ours."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import linear_cross_entropy, loss_sums

    linear_cross_entropy._CHUNK["cpu"] = few
    world = start_world(tensor=config.parallel.tensor)
    model = model_of(config, world)
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


def regularised(config):
    """The loss of one batch in training and in evaluation, and the logits."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import loss_sums

    world = start_world(tensor=1)
    model = model_of(config, world)
    batch = family_batches(config, world, 0)[0]
    with torch.no_grad():
        losses = [float(loss_sums(model.train(training), batch)[0]) for training in (True, False)]
        inputs = dict(batch)
        inputs.pop("prefix_length", None)
        labels, mask = inputs.pop("labels"), inputs.pop("loss_mask")
        if "masked_positions" in inputs:
            kinds = ("tokens", "position_ids", "token_types", "padding_mask", "masked_positions")
            logits, _ = model(*(inputs[name] for name in kinds))
        else:
            logits = model(inputs["tokens"], inputs["position_ids"], None)
    stop_world()
    return losses, logits, labels, mask


@pytest.mark.parametrize("family", ["llama", "bert-pre"])
def test_smoothing_and_z_loss_are_in_training_alone(family):
    config = family_config(family)
    options = {"dropout": 0.0, "init_std": 0.2, "label_smoothing": 0.1, "z_loss": 1e-2}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **options))
    (((training, evaluation), logits, labels, mask),) = run_ranks(regularised, 1, config)
    logits = logits.double().flatten(0, 1)

    def loss(smoothing, z_loss):
        losses = torch.nn.functional.cross_entropy(
            logits, labels.flatten(), reduction="none", label_smoothing=smoothing
        )
        losses += z_loss * logits.logsumexp(dim=1).square()
        return float((losses * mask.flatten()).sum())

    assert training == pytest.approx(loss(0.1, 1e-2), rel=1e-5)
    assert evaluation == pytest.approx(loss(0.0, 0.0), rel=1e-5)
    assert training > 1.01 * evaluation
