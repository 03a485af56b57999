"""Operators that claim to keep the function keep it, in fp64; all others are seen to change it."""

import pytest
import torch
from torch_models import GROUPS, grow_dense, load, random_stack, state_of, tokens

from lag_megatron.errors import PlanError
from lag_megatron.growth.growth_map import depth_map
from lag_megatron.growth.operators import OPERATORS
from lag_megatron.growth.plan import GrowthPlan

SOURCE = 4
EXACT, CHANGED = 1e-10, 1e-3
LAG = {"index": 1, "block_size": 1}
# name: (operator, layers after, options, kinds whose function it keeps)
PRE, POST = {"gpt", "llama"}, {"bert"}
CASES = {
    "identity": ("identity", 4, {}, PRE | POST),
    "lag duplicate": ("lag", 6, {**LAG, "init": "duplicate"}, set()),
    "lag random": ("lag", 6, {**LAG, "init": "random"}, set()),
    "lag duplicate zero": ("lag", 6, {**LAG, "init": "duplicate", "scale": 0}, PRE),
    "lag random zero": ("lag", 6, {**LAG, "init": "random", "scale": 0}, PRE),
    "lag half": ("lag", 6, {**LAG, "init": "duplicate", "scale": 0.5}, set()),
    "last": ("last", 6, {}, set()),
    "last zero": ("last", 6, {"scale": 0.0}, PRE),
    "random_top": ("random_top", 6, {}, set()),
    "random_top zero": ("random_top", 6, {"scale": 0}, PRE),
    "progressive": ("progressive", 8, {}, set()),
    "progressive zero": ("progressive", 8, {"scale": 0}, PRE),
    "g_stack": ("g_stack", 12, {}, set()),
    "g_stack zero": ("g_stack", 12, {"scale": 0}, PRE),
    "midas": ("midas", 6, {}, set()),
    "midas zero": ("midas", 6, {"scale": 0}, PRE),
    "interpolate": ("interpolate", 7, {}, set()),
    "interpolate zero": ("interpolate", 7, {"scale": 0}, PRE),
    "slices": ("slices", 6, {"layers": "0-2,1-3"}, set()),
    "slices zero": ("slices", 6, {"layers": "0-2,1-3", "scale": 0}, PRE),
    "slices without one": ("slices", 6, {"layers": "0,1,3,0,1,3", "scale": 0}, set()),
    "slices in disorder": ("slices", 6, {"layers": "1,0,2-3,0-1", "scale": 0}, set()),
    "llama_pro": ("llama_pro", 6, {}, PRE),
    "llama_pro each": ("llama_pro", 8, {}, PRE),
    "staged": ("staged", 8, {}, PRE),
    "staged on top": ("staged", 8, {"placement": "append"}, PRE),
    "staged copies": ("staged", 8, {"matrices": "copy"}, PRE),
    "post_ln_identity": ("post_ln_identity", 6, {}, POST),
    "post_ln_identity chains": ("post_ln_identity", 8, {"after": [0, 3, 0, 0]}, POST),
}


def plan_of(case, **values):
    operator, target, options, _ = CASES[case]
    return GrowthPlan(
        operator=operator, options=options, source_layers=SOURCE, target_layers=target,
        init_std=0.4, **values,
    )  # fmt: skip


def difference(case, kind, **options):
    old = random_stack(kind, SOURCE, **options)
    plan = plan_of(case)
    new = load(kind, plan.target_layers, grow_dense(plan, state_of(old)), **options)
    with torch.no_grad():
        return float((old(tokens(1)) - new(tokens(1))).abs().max())


def test_every_operator_is_tried():
    assert {operator for operator, *_ in CASES.values()} == set(OPERATORS)


@pytest.mark.parametrize("case", CASES)
def test_claims(case):
    kept = CASES[case][3]
    assert plan_of(case).preserves_function("pre") is (kept >= PRE)
    assert plan_of(case).preserves_function("post") is (kept >= POST)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind)
        for case in CASES
        for kind in sorted(PRE | POST)
        if "post_ln" not in case and (kind in PRE or "staged" not in case)
    ],
)
def test_outputs(case, kind):
    found = difference(case, kind)
    if kind in CASES[case][3]:
        assert found < EXACT
    else:
        assert found > CHANGED


@pytest.mark.parametrize("case", [c for c in CASES if "post_ln" in c])
def test_outputs_of_post_ln_insertion(case):
    assert difference(case, "bert") < EXACT
    # A plain norm divides once more by sqrt(variance + eps): what is left is of the order of eps.
    assert EXACT < difference(case, "bert", eps=1e-5) < CHANGED
    for kind in PRE:
        old = state_of(random_stack(kind, SOURCE))
        with pytest.raises(PlanError, match="post-LN"):
            grow_dense(plan_of(case), old)


@pytest.mark.parametrize("case", [c for c in CASES if "staged" in c])
def test_silent_layers_of_a_post_ln_model_are_refused(case):
    old = state_of(random_stack("bert", SOURCE))
    with pytest.raises(PlanError, match=r"'staged' .*post-LN.*'post_ln_identity'.*\[0, 1, 2, 3\]"):
        grow_dense(plan_of(case), old)


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_scaled_duplication_lies_between_identity_and_copy(scale):
    distances = []
    for factor in (0.0, scale, 1.0):
        plan = GrowthPlan(operator="last", options={"scale": factor}, source_layers=SOURCE,
                          target_layers=5)  # fmt: skip
        old = random_stack("gpt", SOURCE)
        new = load("gpt", 5, grow_dense(plan, state_of(old)))
        with torch.no_grad():
            distances.append(float((old(tokens(1)) - new(tokens(1))).abs().mean()))
    assert distances[0] < EXACT < distances[1] < distances[2]


def gradients(model):
    generator = torch.Generator().manual_seed(7)
    logits = model(tokens(2))
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (logits * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", ["post_ln_identity", "post_ln_identity chains"])
def test_gradients_of_post_ln_insertion(case):
    """What is old has the gradient it had, and so has a norm that was handed over."""
    old = random_stack("bert", SOURCE)
    plan = plan_of(case)
    new = load("bert", plan.target_layers, grow_dense(plan, state_of(old)))
    before, after = gradients(old), gradients(new)
    counts = dict.fromkeys(("kept", "handed over"), 0)
    places = [i for i, o in enumerate(plan.layer_map) if not o.is_new]
    for name, gradient in before.items():
        where = name
        if ".layers." in name:
            layer = int(name.split(".")[2])
            place, end = places[layer], [*places, plan.target_layers][layer + 1] - 1
            moved = "post_mlp_layernorm" in name and end > place
            where = name.replace(f".{layer}.", f".{end if moved else place}.", 1)
            counts["handed over" if moved else "kept"] += 1
        assert gradient.abs().max() > 1e-3, name
        assert (after[where] - gradient).abs().max() < 1e-9, name
    inserted = len({o.source for o in plan.layer_map if o.is_new})
    assert counts == {"handed over": 2 * inserted, "kept": 12 * SOURCE - 2 * inserted}


@pytest.mark.parametrize(("case", "kind"), [("llama_pro", "llama"), ("random_top zero", "gpt"),
                                            ("post_ln_identity", "bert")])  # fmt: skip
def test_an_identity_layer_can_learn(case, kind):
    """Its output projections have a gradient at the first step, so that it does not stay one."""
    plan = plan_of(case)
    new = load(kind, plan.target_layers, grow_dense(plan, state_of(random_stack(kind, SOURCE))))
    found = gradients(new)
    for layer, origin in enumerate(plan.layer_map):
        if origin.is_new:
            for tail in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
                assert found[f"decoder.layers.{layer}.{tail}"].abs().max() > 1e-3


def test_keeping_the_function_does_not_hang_on_the_drawn_values():
    """Gesmundo and Maile 2023: it holds for any value of the parameters that stay free."""
    for seed in (1, 2, 3):
        old = random_stack("llama", SOURCE, seed=seed)
        plan = plan_of("random_top zero", seed=seed)
        new = load("llama", 6, grow_dense(plan, state_of(old)))
        assert (old(tokens(seed)) - new(tokens(seed))).abs().max() < EXACT
        fc1 = new.decoder.layers[5].mlp.linear_fc1.weight
        assert 0.3 < fc1.std() < 0.5


def test_blocks_cover_every_parameter():
    for case in CASES:
        kind = "bert" if "post_ln" in case else "gpt"
        shapes = {n: tuple(t.shape) for n, t in state_of(random_stack(kind, SOURCE)).items()}
        target = plan_of(case).target_layers
        growth = depth_map(plan_of(case), [shapes], query_groups=GROUPS)
        wanted = {n: tuple(t.shape) for n, t in state_of(random_stack(kind, target)).items()}
        assert growth.groups == [wanted]
        assert list(growth.groups[0]) == list(wanted)
