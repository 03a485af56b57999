"""Staged training's depth operator: layers that hear nothing are the identity, and learn."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_layers import numpy_layer
from test_tools_checkpoint import grow
from test_transfer import TOPOLOGIES, check, dense
from torch_models import (
    FFN,
    HIDDEN,
    Stack,
    grow_dense,
    load,
    random_stack,
    state_of,
    tokens,
)

from lag_megatron.checkpoint import commit
from lag_megatron.checkpoint.boxes import Box, whole
from lag_megatron.checkpoint.layout import STATES
from lag_megatron.checkpoint.zero import ZeroCheckpoint
from lag_megatron.config import GrowthConfig, PoolConfig
from lag_megatron.errors import PlanError
from lag_megatron.growth.fresh import Diagonals, Normal, fill, normal
from lag_megatron.growth.growth_map import depth_map, moment_policy
from lag_megatron.growth.layer_map import draw
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.pool import build_pool

SOURCE = 4
VARIANTS = {
    "identity": {},
    "identity on top": {"placement": "append"},
    "copies": {"matrices": "copy"},
}
# Which parameters of a new layer have a gradient right after growing, by the end of their names.
HEARD = {
    "gpt": {"input_layernorm.weight", "input_layernorm.bias", "self_attention.linear_qkv.bias",
            "self_attention.linear_proj.bias", "pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias",
            "mlp.linear_fc1.bias", "mlp.linear_fc2.bias"},
    "llama": {"input_layernorm.weight", "mlp.linear_fc2.weight"},
}  # fmt: skip


def plan_of(*, operator="staged", source=SOURCE, moments="auto", **options):
    return GrowthPlan(
        operator=operator, options=options, source_layers=source, target_layers=2 * source,
        moments=moments,
    )  # fmt: skip


def loss_of(model, text):
    """A task that needs attention: to tell the token before, which the first place cannot."""
    return F.cross_entropy(model(text).flatten(0, 1), text.roll(1, 1).flatten())


def gradients(model, seed=3):
    loss = loss_of(model, tokens(seed))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def places(plan):
    """Grown layer of each old one, and numbers of the new layers."""
    new = sorted(plan.new_layers)
    return [i for i in range(plan.target_layers) if i not in new], new


def grown_name(name, plan):
    if ".layers." not in name:
        return name
    layer = int(name.split(".")[2])
    return name.replace(f".{layer}.", f".{places(plan)[0][layer]}.", 1)


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


# Weights


def groups_of(layers, *, hidden, ffn, groups, heads, gated, bias):
    """Whole shapes of a model: matrices, then vectors."""
    rows = (heads + 2 * groups) * (hidden // heads)
    matrices = {"embedding.word_embeddings.weight": (8, hidden)}
    vectors = {}
    for layer in range(layers):
        at = f"decoder.layers.{layer}."
        vectors[at + "input_layernorm.weight"] = (hidden,)
        matrices[at + "self_attention.linear_proj.weight"] = (hidden, hidden)
        matrices[at + "self_attention.linear_qkv.weight"] = (rows, hidden)
        vectors[at + "pre_mlp_layernorm.weight"] = (hidden,)
        matrices[at + "mlp.linear_fc1.weight"] = (ffn * (2 if gated else 1), hidden)
        matrices[at + "mlp.linear_fc2.weight"] = (hidden, ffn)
        if bias:
            vectors[at + "input_layernorm.bias"] = (hidden,)
            vectors[at + "self_attention.linear_qkv.bias"] = (rows,)
            vectors[at + "self_attention.q_layernorm.weight"] = (hidden // heads,)
            vectors[at + "mlp.linear_fc2.bias"] = (hidden,)
    return [matrices, vectors]


MODELS = st.fixed_dictionaries({
    "hidden": st.sampled_from([8, 16]),
    "ffn": st.sampled_from([4, 8, 12, 20]),
    "groups": st.just(4),
    "heads": st.sampled_from([4, 8]),
    "gated": st.booleans(),
    "bias": st.booleans(),
})  # fmt: skip


def dense_growth(groups, tensors, plan, state, model):
    """The whole grown model, old layers copied, new ones by ``numpy_layer``."""
    grown = {n: t for n, t in tensors.items() if ".layers." not in n}
    for layer, origin in enumerate(plan.layer_map):
        mark, here = f".layers.{origin.source}.", f"decoder.layers.{layer}."
        inside = {n.partition(mark)[2]: t for n, t in tensors.items() if mark in n}

        def normals(tail, shape, here=here):
            key = f"growth/1234/{plan.source_layers}-{plan.target_layers}/{here}{tail}"
            return normal(Normal(0.02, key), 0, math.prod(shape)).reshape(shape)

        if origin.is_new and state == "fp32":
            shapes = {tail: tuple(t.shape) for tail, t in inside.items()}
            facts = {k: model[k] for k in ("groups", "heads", "gated")}
            made = numpy_layer(shapes, **facts, normals=normals)
            inside = {tail: torch.from_numpy(array) for tail, array in made.items()}
        elif origin.is_new:
            inside = {tail: torch.zeros_like(t) for tail, t in inside.items()}
        grown |= {here + tail: t for tail, t in inside.items()}
    return grown


@settings(max_examples=120)
@given(MODELS, TOPOLOGIES, TOPOLOGIES, st.sampled_from(STATES), st.data())
def test_weights_and_moments_under_any_topology(model, source, target, state, data):
    placement = data.draw(st.sampled_from(["alternate", "append"]))
    plan = plan_of(source=2, placement=placement)
    groups = groups_of(2, **model)
    tensors = dense(groups, 5)
    expected = dense_growth(groups, tensors, plan, state, model)
    growth = depth_map(plan, groups, query_groups=model["groups"])
    check(growth, groups, source, target, model["gated"], expected, state, tensors)


def test_copies_keep_matrices_and_silence_the_rest():
    plan = plan_of(matrices="copy", placement="append")
    for kind in ("gpt", "llama"):
        old = state_of(random_stack(kind, SOURCE))
        new = grow_dense(plan, old)
        for name, tensor in old.items():
            if ".layers." not in name:
                continue
            layer = int(name.split(".")[2])
            found = new[name.replace(f".{layer}.", f".{SOURCE + layer}.", 1)]
            gated = kind == "llama"
            is_zero = name.endswith("bias") or "input_layernorm" in name
            is_zero |= ("linear_fc2" in name) if gated else ("norm" in name)
            assert torch.equal(found, torch.zeros_like(tensor) if is_zero else tensor), name


@given(st.data())
def test_a_box_of_diagonals_is_that_of_the_whole(data):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    cut = data.draw(st.integers(0, rows))
    runs = [(first, data.draw(st.integers(0, columns - 1)), data.draw(st.integers(1, last - first)))
            for first, last in ((0, cut), (cut, rows)) if last > first]  # fmt: skip
    runs = tuple((row, low, min(n, columns - low)) for row, low, n in runs)
    rest = data.draw(st.sampled_from([None, Normal(1.0, "rest")]))
    everything = np.zeros((rows, columns), np.float32)
    if rest:
        everything = normal(rest, 0, rows * columns).reshape(rows, columns)
    for row, low, length in runs:
        everything[row : row + length] = np.eye(length, columns, low, dtype=np.float32)
    low = (data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1)))
    box = Box(low, (data.draw(st.integers(1, rows - low[0])),
                    data.draw(st.integers(1, columns - low[1]))))  # fmt: skip
    for wanted in (box, whole((rows, columns))):
        part = torch.full(wanted.shape, math.nan)
        fill(part, Diagonals(runs, rest), shape=(rows, columns), box=wanted)
        (top, left), (height, width) = wanted.low, wanted.shape
        assert np.array_equal(part.numpy(), everything[top : top + height, left : left + width])


# Moments


@pytest.mark.parametrize("moments", ["auto", "zero", "borrow", "copy"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_moments(variant, moments):
    """Old layers keep theirs, bit for bit (published code overwrote them); new by the policy."""
    plan = plan_of(moments=moments, **VARIANTS[variant])
    policy = "zero" if moments == "auto" else moments
    assert {moment_policy(plan, o) for o in plan.layer_map if o.is_new} == {policy}
    kept, new = places(plan)
    for seed, state in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        old = state_of(random_stack("llama", SOURCE, seed=seed))
        found = grow_dense(plan, old, state)
        copied = policy == "copy" or (policy == "borrow" and state == "exp_avg_sq")
        for name, tensor in old.items():
            assert torch.equal(found[grown_name(name, plan)], tensor)
            if ".layers." in name:
                layer = int(name.split(".")[2])
                there = found[name.replace(f".{layer}.", f".{new[layer]}.", 1)]
                assert torch.equal(there, tensor if copied else torch.zeros_like(tensor)), name
        assert len(kept) == len(new) == SOURCE


# What is refused


def test_models_that_are_not_known():
    groups = groups_of(4, hidden=8, ffn=12, groups=4, heads=4, gated=False, bias=False)
    known = plan_of(query_groups=4)
    assert depth_map(known, groups) == depth_map(known, groups, query_groups=4)
    for plan, groups_known, message in (
        (plan_of(), None, r"does not tell .* query groups.*query_groups .* or matrices = copy"),
        (known, 2, "query_groups is 4, but the checkpoint's model has 2"),
        (plan_of(query_groups=3), None, "24 rows of linear_qkv, 8 of them queries, are not 3"),
    ):
        with pytest.raises(PlanError, match=message) as caught:
            depth_map(plan, groups, query_groups=groups_known)
        assert "\n" not in str(caught.value)
    depth_map(plan_of(matrices="copy"), groups)
    for shapes, message in (
        ([{n: s for n, s in g.items() if "pre_mlp" not in n} for g in groups], "pre_mlp_layernorm"),
        ([g | {f"decoder.layers.{i}.mlp.router.weight": (2, 8) for i in range(4)} for g in groups],
         r"mlp\.router\.weight"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=message):
            depth_map(known, shapes)


def test_a_pool_of_one():
    growth = GrowthConfig(pool=PoolConfig(operator="staged", options={"placement": "append"}))
    sizes = {"source_layers": 3, "seed": 1, "init_std": 0.02}
    (only,) = build_pool(growth, target_layers=6, **sizes)
    assert (only.id, draw(only.plan.layer_map)) == ("staged", "1 2 3 I I I")
    entry = json.loads(json.dumps(only.describe()))
    assert entry["placement"] == "append"
    assert entry["layer_map"][0] == {
        "source": 0, "new": False, "init": "duplicate", "scale": 1.0,
    }  # fmt: skip
    assert entry["layer_map"][4] == {
        "source": 1, "new": True, "init": "identity", "scale": 1.0, "silent": True,
    }  # fmt: skip
    with pytest.raises(PlanError, match="3 become 6, not 5"):
        build_pool(growth, target_layers=5, **sizes)


def test_the_tool(checkpoint, tmp_path, capsys):
    staged = ("--operator", "staged", "--layers", 4)
    assert grow(checkpoint, tmp_path / "out", *staged, "--set", "placement=append") == 0
    assert "layers 2 -> 4: 1 2 I I\n" in capsys.readouterr().out
    assert list(commit.damages(tmp_path / "out" / "step3")) == []
    (history,) = ZeroCheckpoint.open(tmp_path / "out" / "step3").client_state["growth_history"]
    assert history["options"] == {"placement": "append"}
    assert grow(checkpoint, tmp_path / "dry", *staged, "--dry-run") == 0
    assert "preserves the function: yes" in capsys.readouterr().out
    assert grow(checkpoint, tmp_path / "no", *staged, "--set", "query_groups=2") == 2
    assert "query_groups is 2, but the checkpoint's model has 4" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


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
