"""The first update after growing, by operator and moment policy, under torch's own AdamW.

The step count is inherited, so the corrections for bias are 1.  Where v starts at 0 an element's
first update is lr (1 - beta1) g / sqrt((1 - beta2) g^2), whatever the gradient g: with betas of 0.9
and 0.999 that is 3.16 lr.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch_models import VOCABULARY, Stack, grow_dense, state_of, tokens

from lag_megatron.growth.plan import GrowthPlan

BETAS, LR, STEPS, LONG = (0.9, 0.999), 1e-3, 48, 1e6
TRAP = (1 - BETAS[0]) / math.sqrt(1 - BETAS[1])
SOURCE = 4
OPERATORS = {
    "lag": (6, {"index": 1, "block_size": 1, "init": "duplicate"}),
    "lag half": (6, {"index": 1, "block_size": 1, "init": "duplicate", "scale": 0.5}),
    "lag random": (6, {"index": 1, "block_size": 1, "init": "random"}),
    "last": (6, {}),
    "random_top": (6, {}),
    "random_top zero": (6, {"scale": 0}),
    "progressive": (8, {}),
    "g_stack": (12, {}),
    "midas": (6, {}),
    "interpolate": (6, {}),
    "slices": (6, {"layers": "0-2,1-3"}),
    "llama_pro": (6, {}),
    "post_ln_identity": (6, {}),
}
# Every element of these has a gradient far above AdamW's eps as soon as its layer gets any.
DENSE = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight", "mlp.linear_fc2.bias")
MOMENTS = ("exp_avg", "exp_avg_sq")


def loss_of(model, step):
    text = tokens(step, batch=16)
    return F.cross_entropy(model(text).flatten(0, 1), (text * 7 % VOCABULARY).flatten())


def adamw(model):
    # The usual eps of 1e-8 is seen beside sqrt(v) of this model's smallest gradients.
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=1e-13, weight_decay=0.0)


@functools.cache
def trained(kind):
    """Whole tensors by state of a stack as after a long run.

    Few steps are enough: with the bias taken out of them the moments are those that a long run of
    the same gradients has, and belong to a large step count.
    """
    torch.manual_seed(0)
    model = Stack(kind, SOURCE, eps=1e-5).double()
    optimizer = adamw(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    states = {"fp32": state_of(model)}
    for moment, beta in zip(MOMENTS, BETAS, strict=True):
        states[moment] = {
            name: optimizer.state[parameter][moment] / (1 - beta**STEPS)
            for name, parameter in model.named_parameters()
        }
    return states


@functools.cache
def first_updates(operator, moments):
    """|first update| / lr of every element, by name, and the growth plan."""
    target, options = OPERATORS[operator]
    kind = "bert" if operator == "post_ln_identity" else "gpt"
    plan = GrowthPlan(
        operator=operator.split()[0], options=options, source_layers=SOURCE, target_layers=target,
        moments=moments,
    )  # fmt: skip
    grown = {state: grow_dense(plan, old, state) for state, old in trained(kind).items()}
    model = Stack(kind, target, eps=1e-5).double()
    model.load_state_dict(grown["fp32"])
    optimizer = adamw(model)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(LONG), **{moment: grown[moment][name] for moment in MOMENTS}
        }  # fmt: skip
    loss_of(model, STEPS).backward()
    optimizer.step()
    updates = {n: (p.detach() - grown["fp32"][n]).abs() / LR for n, p in model.named_parameters()}
    return updates, plan


def of_layers(operator, moments, *, new, tails=DENSE):
    updates, plan = first_updates(operator, moments)
    return torch.cat([
        updates[f"decoder.layers.{layer}.{tail}"].flatten()
        for layer, origin in enumerate(plan.layer_map) if origin.is_new is new for tail in tails
    ])  # fmt: skip


def rms(values):
    return float(values.square().mean().sqrt())


def test_the_trap_is_what_the_formula_says():
    assert pytest.approx(3.1623, abs=1e-4) == TRAP


@pytest.mark.parametrize("operator", OPERATORS)
def test_zero_moments_take_the_trap_in_every_element(operator):
    found = of_layers(operator, "zero", new=True)
    assert rms(found) == pytest.approx(TRAP, rel=1e-3)
    assert float(found.max()) <= TRAP * (1 + 1e-6)
    assert float(found.median()) == pytest.approx(TRAP, rel=1e-3)


@pytest.mark.parametrize("moments", ["auto", "copy", "borrow"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_other_policies_stay_near_the_old_layers(operator, moments):
    old = of_layers(operator, moments, new=False)
    new = of_layers(operator, moments, new=True)
    assert 0.4 < rms(old) < 0.8
    assert float(old.max()) < 1.5
    assert float(new.max()) < 1.5
    assert rms(new) < 0.8
    if moments == "borrow":  # without m a tenth of a gradient moves the weights
        assert float(new.max()) < 1.0
        assert 0 < rms(new) < 0.2


@pytest.mark.parametrize("moments", ["auto", "copy", "zero", "borrow"])
def test_norms_that_became_plain_take_it_whatever_the_policy(moments):
    """They stand elsewhere in the network than any norm whose v could be borrowed."""
    updates, plan = first_updates("post_ln_identity", moments)
    for layer, origin in enumerate(plan.layer_map):
        for branch in ("attn", "mlp"):
            name = f"decoder.layers.{layer}.post_{branch}_layernorm.weight"
            plain = {"attn": "attention"}.get(branch, branch) in origin.identity_norms
            if plain:
                assert rms(updates[name]) == pytest.approx(TRAP, rel=1e-3)
            elif not origin.is_new or branch == "mlp":  # kept, or handed over with its moments
                assert float(updates[name].max()) < 1.5
