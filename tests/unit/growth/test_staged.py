"""Staged training's depth operator: layers that hear nothing are the identity, and learn."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from staged_plans import SOURCE, VARIANTS, grown_name, plan_of
from torch_models import FFN, HIDDEN, Stack, grow_dense, load, random_stack, state_of, tokens

# Which parameters of a new layer have a gradient right after growing, by the end of their names.
HEARD = {
    "gpt": {"input_layernorm.weight", "input_layernorm.bias", "self_attention.linear_qkv.bias",
            "self_attention.linear_proj.bias", "pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias",
            "mlp.linear_fc1.bias", "mlp.linear_fc2.bias"},
    "llama": {"input_layernorm.weight", "mlp.linear_fc2.weight"},
}  # fmt: skip


def loss_of(model, text):
    """A task that needs attention: to tell the token before, which the first place cannot."""
    return F.cross_entropy(model(text).flatten(0, 1), text.roll(1, 1).flatten())


def gradients(model, seed=3):
    loss = loss_of(model, tokens(seed))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("variant", [*VARIANTS, "llama_pro"])
def test_loss_and_gradients_of_all_that_is_old_stay(variant, kind):
    plan = plan_of(operator="llama_pro") if variant == "llama_pro" else plan_of(**VARIANTS[variant])
    old = random_stack(kind, SOURCE)
    new = load(kind, plan.target_layers, grow_dense(plan, state_of(old)))
    (before, wanted), (after, found) = gradients(old), gradients(new)
    assert after == pytest.approx(before, abs=1e-10)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-4, name
        assert (found[grown_name(name, plan)] - gradient).abs().max() < 1e-10, name


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_of_a_new_layer_has_a_gradient_at_the_first_step(variant, kind):
    plan = plan_of(**VARIANTS[variant])
    new = load(kind, plan.target_layers, grow_dense(plan, state_of(random_stack(kind, SOURCE))))
    _, found = gradients(new)
    for layer in plan.new_layers:
        mark = f".layers.{layer}."
        inside = {n.partition(mark)[2]: g for n, g in found.items() if mark in n}
        assert {tail for tail, g in inside.items() if g.abs().max() > 1e-9} == HEARD[kind]
        assert all(g.abs().max() == 0 for tail, g in inside.items() if tail not in HEARD[kind])


def test_a_silent_norm_before_a_gated_mlp_would_never_learn():
    """Why a gated MLP is silenced by fc2: the paper's layer has no gradient there at all."""
    plan = plan_of()
    tensors = grow_dense(plan, state_of(random_stack("llama", SOURCE)))
    for layer in plan.new_layers:
        at = f"decoder.layers.{layer}."
        tensors[at + "pre_mlp_layernorm.weight"] = torch.zeros(HIDDEN, dtype=torch.float64)
        tensors[at + "mlp.linear_fc2.weight"] = torch.eye(HIDDEN, FFN, dtype=torch.float64)
    _, found = gradients(load("llama", plan.target_layers, tensors))
    for layer in plan.new_layers:
        stuck = [g for n, g in found.items() if f".{layer}.mlp." in n or f".{layer}.pre_mlp" in n]
        assert len(stuck) == 3
        assert all(g.abs().max() == 0 for g in stuck)


def test_zeros_that_the_identity_leaves_in_fc1_would_never_learn():
    """Why those rows are drawn: they and the columns of fc2 that read them have no gradient."""
    plan = plan_of()
    tensors = grow_dense(plan, state_of(random_stack("gpt", SOURCE)))
    name = "decoder.layers.1.mlp.linear_fc{}.weight"
    tensors["decoder.layers.1.pre_mlp_layernorm.weight"].fill_(1.0)  # once the norm is heard
    for is_drawn in (True, False):
        if not is_drawn:
            tensors[name.format(1)][HIDDEN:] = 0
        _, found = gradients(load("gpt", plan.target_layers, tensors))
        assert bool(found[name.format(2)][:, HIDDEN:].any()) is is_drawn
        assert not found[name.format(1)][HIDDEN:].any()
        assert found[name.format(2)][:, :HIDDEN].abs().max() > 1e-4


# Training after growing

BETAS, RATE, LONG, RISE, AFTER = (0.9, 0.98), 3e-3, 120, 20, 50


def train(model, moments, first, last, *, warm_from=None):
    """Losses on a fixed set before each step; state goes on from ``moments`` at step ``first``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0)
    for name, parameter in model.named_parameters():
        if moments:
            own = {state: tensors[name].clone() for state, tensors in moments.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(first)), **own}
    fixed, losses = tokens(10**6, batch=64), []
    for step in range(first, last):
        with torch.no_grad():
            losses.append(float(loss_of(model, fixed)))
        if warm_from is not None:
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step - warm_from + 1) / RISE)
        optimizer.zero_grad()
        loss_of(model, tokens(step, batch=32)).backward()
        optimizer.step()
    states = {
        state: {n: optimizer.state[p][state].clone() for n, p in model.named_parameters()}
        for state in ("exp_avg", "exp_avg_sq")
    }
    return losses, states


@functools.cache
def base(kind):
    torch.manual_seed(0)
    model = Stack(kind, SOURCE, eps=1e-5).double()
    losses, moments = train(model, None, 0, LONG)
    return state_of(model), moments, losses


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("variant", ["identity", "copies"])
def test_the_slope_after_growing(variant, kind):
    """The loss does not jump, goes on falling as the old model's does, and new layers move."""
    weights, moments, _ = base(kind)
    alone = load(kind, SOURCE, weights, eps=1e-5)
    kept, _ = train(alone, moments, LONG, LONG + AFTER, warm_from=LONG)
    plan = plan_of(**VARIANTS[variant])
    started = grow_dense(plan, weights)
    grown = load(kind, plan.target_layers, started, eps=1e-5)
    after = {state: grow_dense(plan, old, state) for state, old in moments.items()}
    found, _ = train(grown, after, LONG, LONG + AFTER, warm_from=LONG)
    steps = np.diff(kept)
    noise = float(np.std(steps))
    assert found[0] == pytest.approx(kept[0], abs=1e-10)
    assert max(np.diff(found)) <= max(steps) + 3 * noise
    assert kept[-1] < kept[0] - 10 * noise
    assert np.mean(found[-10:]) <= np.mean(kept[-10:]) + 3 * noise
    reached = state_of(grown)
    for layer in plan.new_layers:
        for tail, dim in {"self_attention.linear_qkv": 1, "self_attention.linear_proj": 0,
                          "mlp.linear_fc1": 1, "mlp.linear_fc2": 0}.items():  # fmt: skip
            name = f"decoder.layers.{layer}.{tail}.weight"
            moved = (reached[name] - started[name]).abs().amax(dim)
            assert moved.min() > 1e-3, name  # no unit stays as it was
