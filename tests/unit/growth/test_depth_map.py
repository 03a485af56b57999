"""What the operators' maps do to tensors: scales, moments, norms, parameters not trained."""

import dataclasses

import pytest

from lag_megatron.checkpoint.state.layout import STATES
from lag_megatron.errors import PlanError
from lag_megatron.growth.growth_map import (
    Copy,
    depth_map,
    growth_map_of,
    identity_map,
    moment_policy,
)
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.weight_init import Constant, Normal

TENSORS = {
    "{post}attn_layernorm.weight": (4,),
    "{post}attn_layernorm.bias": (4,),
    "self_attention.linear_qkv.weight": (12, 4),
    "self_attention.linear_proj.weight": (4, 4),
    "self_attention.linear_proj.bias": (4,),
    "{post}mlp_layernorm.weight": (4,),
    "{post}mlp_layernorm.bias": (4,),
    "mlp.linear_fc1.weight": (8, 4),
    "mlp.linear_fc2.weight": (4, 8),
    "mlp.linear_fc2.bias": (4,),
}
OUTPUTS = tuple(name for name in TENSORS if "linear_proj" in name or "linear_fc2" in name)


def named(template, post="pre_"):
    """Megatron's name: of the norms before branches, or of those after them."""
    return template.format(post=post).replace("pre_attn_layernorm", "input_layernorm")


def groups_of(layers, *, post="pre_", only=lambda layer, name: True):
    names = {named(name, post): shape for name, shape in TENSORS.items()}
    shapes = {"embedding.word_embeddings.weight": (16, 4)}
    shapes |= {
        f"decoder.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in names.items()
        if only(layer, name)
    }
    return [shapes]


def plan_of(operator, source, target, *, moments="auto", **options):
    return GrowthPlan(
        operator=operator,
        options=options,
        source_layers=source,
        target_layers=target,
        moments=moments,
    )


def sources(growth, layer, name):
    (block,) = growth.blocks[f"decoder.layers.{layer}.{name}"]
    return block.sources


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 0.5), (0.0, None), (1.0, 1.0)])
def test_scale_acts_on_the_branches_outputs_alone(scale, expected):
    growth = depth_map(plan_of("last", 2, 3, scale=scale), groups_of(2))
    for template, shape in TENSORS.items():
        name = named(template)
        copied = Copy(f"decoder.layers.1.{name}", (0,) * len(shape))
        for layer in (0, 1):
            whole = dataclasses.replace(copied, parameter=f"decoder.layers.{layer}.{name}")
            assert sources(growth, layer, name) == dict.fromkeys(STATES, whole)
        found = sources(growth, 2, name)
        if template not in OUTPUTS:
            assert found["fp32"] == copied
        elif expected is None:
            assert found["fp32"] == Constant(0.0)
        else:
            assert found["fp32"] == dataclasses.replace(copied, scale=expected)
        assert found["exp_avg_sq"] == copied
        assert found["exp_avg"] == (Constant(0.0) if scale == 0 else copied)


def test_scale_of_fresh_layers():
    plain = depth_map(plan_of("random_top", 2, 3), groups_of(2))
    half = depth_map(plan_of("random_top", 2, 3, scale=0.5), groups_of(2))
    zero = depth_map(plan_of("random_top", 2, 3, scale=0), groups_of(2))
    name = "mlp.linear_fc2.weight"
    drawn_, halved = sources(plain, 2, name)["fp32"], sources(half, 2, name)["fp32"]
    assert isinstance(drawn_, Normal)
    assert halved == Normal(drawn_.std / 2, drawn_.key)
    assert sources(zero, 2, name)["fp32"] == Constant(0.0)
    assert sources(zero, 2, "mlp.linear_fc2.bias")["fp32"] == Constant(0.0)
    for other in ("mlp.linear_fc1.weight", "pre_mlp_layernorm.weight"):
        assert sources(zero, 2, other)["fp32"] == sources(plain, 2, other)["fp32"]
    assert isinstance(sources(zero, 2, "mlp.linear_fc1.weight")["fp32"], Normal)


@pytest.mark.parametrize(
    ("operator", "options", "policy"),
    [
        ("last", {}, "copy"),
        ("last", {"scale": 0.01}, "copy"),
        ("last", {"scale": 0}, "borrow"),
        ("llama_pro", {}, "borrow"),
        ("random_top", {}, "borrow"),
        ("random_top", {"scale": 0}, "borrow"),
    ],
)
def test_auto_moments(operator, options, policy):
    plan = plan_of(operator, 2, 3, **options)
    assert {moment_policy(plan, o) for o in plan.layer_map if o.is_new} == {policy}
    zero = plan_of(operator, 2, 3, moments="zero", **options)
    assert {moment_policy(zero, o) for o in zero.layer_map if o.is_new} == {"zero"}


@pytest.mark.parametrize("moments", ["auto", "copy", "zero", "borrow"])
def test_post_ln_norms_are_handed_over(moments):
    """1 -> 1 1z 1z, 2: the second norm of layer 1 goes to the end of the chain with its moments."""
    plan = plan_of("post_ln_identity", 2, 4, after=[0, 0], moments=moments)
    growth = depth_map(plan, groups_of(2, post="post_"))
    nothing = {"exp_avg": Constant(0.0), "exp_avg_sq": Constant(0.0)}
    for part, value in (("weight", 1.0), ("bias", 0.0)):
        attention, mlp = f"post_attn_layernorm.{part}", f"post_mlp_layernorm.{part}"
        plain = {"fp32": Constant(value), **nothing}
        kept = {n: dict.fromkeys(STATES, Copy(f"decoder.layers.0.{n}", (0,)))
                for n in (attention, mlp)}  # fmt: skip
        assert sources(growth, 0, attention) == kept[attention]
        assert sources(growth, 0, mlp) == plain
        assert sources(growth, 1, attention) == sources(growth, 1, mlp) == plain
        assert sources(growth, 2, attention) == plain
        assert sources(growth, 2, mlp) == kept[mlp]
    for layer in (1, 2):
        for output in OUTPUTS:
            assert sources(growth, layer, output)["fp32"] == Constant(0.0)
        found = sources(growth, layer, "mlp.linear_fc1.weight")
        copied = Copy("decoder.layers.0.mlp.linear_fc1.weight", (0, 0))
        assert found["fp32"] == copied
        assert found["exp_avg"] == (copied if moments == "copy" else Constant(0.0))
        assert found["exp_avg_sq"] == (Constant(0.0) if moments == "zero" else copied)
    for name in groups_of(1, post="post_")[0]:
        if ".layers." in name:
            tail = name.partition(".0.")[2]
            old = Copy(f"decoder.layers.1.{tail}", (0,) * len(growth.groups[0][name]))
            assert sources(growth, 3, tail) == dict.fromkeys(STATES, old)


def test_a_plan_for_another_kind_of_model_is_refused():
    with pytest.raises(PlanError, match=r"'post_ln_identity' needs .*post_attn_layernorm.*post-LN"):
        depth_map(plan_of("post_ln_identity", 2, 3, after=[0]), groups_of(2))
    strange = [{f"layers.{n}.dense.weight": (4, 4) for n in range(2)}]
    depth_map(plan_of("last", 2, 3), strange)
    with pytest.raises(PlanError, match=r"'llama_pro' .* role(.|\n)*\"layers\.\*\.dense\.weight\""):
        depth_map(plan_of("llama_pro", 2, 3), strange)


# Parameters that are not trained


def split(layers, is_trained):
    trained = groups_of(layers, only=is_trained)
    frozen = groups_of(layers, only=lambda layer, name: not is_trained(layer, name))[0]
    del frozen["embedding.word_embeddings.weight"]
    return trained, frozen


@pytest.mark.parametrize(
    "is_trained",
    [
        lambda layer, name: layer == 1,
        lambda layer, name: layer != 1,
        lambda layer, name: "mlp" in name,
        lambda layer, name: layer == 0 and "norm" in name,
    ],
    ids=["one layer", "all but one", "some tensors", "some of one layer"],
)
def test_frozen_parameters_grow_by_the_same_map(is_trained):
    plan = plan_of("lag", 3, 5, index=1, block_size=1, init="duplicate", scale=0.5)
    trained, frozen = split(3, is_trained)
    growth = depth_map(plan, trained, frozen=frozen)
    together = depth_map(plan, groups_of(3))
    assert growth.blocks == together.blocks
    names = [*growth.groups[0], *growth.frozen]
    assert sorted(names) == sorted(together.groups[0])
    for layer, source in enumerate((0, 1, 1, 2, 2)):  # a new layer is frozen where its source is
        for template in TENSORS:
            name = named(template)
            home = growth.groups[0] if is_trained(source, name) else growth.frozen
            assert f"decoder.layers.{layer}.{name}" in home
    numbers = [int(name.split(".")[2]) for name in growth.frozen]
    assert numbers == sorted(numbers)


def test_nothing_is_frozen_by_default():
    assert depth_map(plan_of("last", 2, 3), groups_of(2)).frozen == {}
    assert identity_map(groups_of(2)).frozen == {}


def test_frozen_layers_must_be_alike_too():
    trained, frozen = split(3, lambda layer, name: layer == 0)
    with pytest.raises(PlanError, match="has 1 layers, but the plan grows from 3"):
        depth_map(plan_of("last", 3, 4), trained)
    frozen["decoder.layers.2.mlp.linear_fc1.weight"] = (6, 4)
    with pytest.raises(PlanError, match="layer 2 has other parameters than layer 0"):
        depth_map(plan_of("last", 3, 4), trained, frozen=frozen)


# The dispatcher


def test_identity_takes_any_model():
    frozen = {"head.bias": (4,)}
    without = [{"embedding.weight": (8, 4), "head.weight": (4, 4)}]
    plan = plan_of("identity", 0, 0)
    assert growth_map_of(plan, without, frozen) == identity_map(without, frozen=frozen)
    assert set(growth_map_of(plan, without, frozen).blocks) == {*without[0], "head.bias"}
    uneven = groups_of(2)
    uneven[0]["decoder.layers.1.mlp.linear_fc1.weight"] = (6, 4)
    growth = growth_map_of(plan_of("identity", 2, 2), uneven, {})
    assert growth == identity_map(uneven)
    assert growth.groups == uneven
    with pytest.raises(PlanError, match="has 2 layers, but the plan grows from 3"):
        growth_map_of(plan_of("identity", 3, 3), uneven, {})


def test_other_operators_take_the_layer_map():
    trained, frozen = split(2, lambda layer, name: layer == 1)
    plan = plan_of("last", 2, 3)
    assert growth_map_of(plan, trained, frozen) == depth_map(plan, trained, frozen=frozen)
    assert growth_map_of(plan_of("identity", 2, 2), trained, frozen) == depth_map(
        plan_of("identity", 2, 2), trained, frozen=frozen
    )
    with pytest.raises(PlanError, match="has 0 layers, but the plan grows from 2"):
        growth_map_of(plan, [{"embedding.weight": (8, 4)}], {})
