"""The depth operators: their maps by hand, what is refused, and what they do to tensors."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lag_megatron.checkpoint.layout import STATES
from lag_megatron.errors import PlanError
from lag_megatron.growth.fresh import Constant, Normal
from lag_megatron.growth.growth_map import (
    Copy,
    depth_map,
    growth_map_of,
    identity_map,
    moment_policy,
)
from lag_megatron.growth.layer_map import LayerOrigin, draw
from lag_megatron.growth.operators import OPERATORS, layer_map_of
from lag_megatron.growth.plan import GrowthPlan

LAG = {"index": 1, "block_size": 2, "init": "duplicate"}


def drawn(operator, source, target, **options):
    return draw(layer_map_of(operator, source, target, options))


@pytest.mark.parametrize(
    ("operator", "source", "target", "options", "expected"),
    [
        ("identity", 3, 3, {}, "1 2 3"),
        ("lag", 4, 6, LAG, "1 2 3 2* 3* 4"),
        ("lag", 4, 6, {**LAG, "scale": 0.5}, "1 2 3 2*0.5 3*0.5 4"),
        ("lag", 4, 6, {**LAG, "scale": 0}, "1 2 3 2z 3z 4"),
        ("lag", 4, 6, {**LAG, "init": "random", "scale": 0.0}, "1 2 3 Rz Rz 4"),
        ("lag", 4, 6, {**LAG, "init": "random", "scale": 0.25}, "1 2 3 R*0.25 R*0.25 4"),
        ("last", 4, 6, {}, "1 2 3 4 3* 4*"),
        ("last", 4, 6, {"scale": 0.5}, "1 2 3 4 3*0.5 4*0.5"),
        ("random_top", 4, 6, {}, "1 2 3 4 R R"),
        ("random_top", 4, 6, {"scale": 0}, "1 2 3 4 Rz Rz"),
        ("progressive", 3, 6, {}, "1 2 3 1* 2* 3*"),
        ("g_stack", 2, 4, {}, "1 2 1* 2*"),
        ("g_stack", 2, 8, {}, "1 2 1* 2* 1* 2* 1* 2*"),
        ("g_stack", 1, 3, {"scale": 0.5}, "1 1*0.5 1*0.5"),
        # k blocks of n layers: block ceil(k / 2) - 1, counted from 0, comes twice.
        ("midas", 2, 4, {}, "1 2 1* 2*"),
        ("midas", 4, 6, {}, "1 2 1* 2* 3 4"),
        ("midas", 6, 8, {}, "1 2 3 4 3* 4* 5 6"),
        ("midas", 8, 10, {}, "1 2 3 4 3* 4* 5 6 7 8"),
        ("midas", 5, 6, {}, "1 2 3 3* 4 5"),
        ("interpolate", 3, 6, {}, "1 1* 2 2* 3 3*"),
        ("interpolate", 4, 6, {}, "1 1* 2 3 3* 4"),
        ("interpolate", 2, 7, {}, "1 1* 1* 1* 2 2* 2*"),
        ("slices", 4, 6, {"layers": "0-2,1-3"}, "1 2 3 2* 3* 4"),
        ("slices", 4, 6, {"layers": " 0-1 , 1,3 ,2-3 "}, "1 2 2* 4 3 4*"),
        ("slices", 4, 5, {"layers": [3, 3, 0, 0, 3]}, "4 4* 1 1* 4*"),
        ("slices", 2, 5, {"layers": "0,0,0,0,0", "scale": 0}, "1 1z 1z 1z 1z"),
        ("llama_pro", 4, 6, {}, "1 2 2z 3 4 4z"),
        ("llama_pro", 3, 6, {}, "1 1z 2 2z 3 3z"),
        ("llama_pro", 3, 4, {}, "1 2 3 3z"),
        ("post_ln_identity", 4, 6, {}, "1 2 2z 3 4 4z"),
        ("post_ln_identity", 3, 6, {"after": [1, 0, 1]}, "1 1z 2 2z 2z 3"),
        ("post_ln_identity", 1, 4, {"after": "0,0,0"}, "1 1z 1z 1z"),
        ("staged", 3, 6, {}, "1 I 2 I 3 I"),
        ("staged", 3, 6, {"placement": "append"}, "1 2 3 I I I"),
        ("staged", 2, 4, {"matrices": "copy", "query_groups": 4}, "1 1i 2 2i"),
        ("staged", 2, 4, {"matrices": "copy", "placement": "append"}, "1 2 1i 2i"),
    ],
)
def test_maps_by_hand(operator, source, target, options, expected):
    assert drawn(operator, source, target, **options) == expected


def test_every_operator_has_a_map_by_hand():
    (mark,) = (m for m in test_maps_by_hand.pytestmark if m.name == "parametrize")
    assert {row[0] for row in mark.args[1]} == set(OPERATORS)


def test_the_published_layouts():
    solar = drawn("slices", 32, 48, layers="0-23,8-31").split()
    assert solar == [
        *(str(n) for n in range(1, 25)),
        *(f"{n}*" for n in range(9, 25)),
        *(str(n) for n in range(25, 33)),
    ]
    pro = drawn("llama_pro", 32, 40).split()
    assert [place for place, layer in enumerate(pro) if "z" in layer] == list(range(4, 40, 5))
    assert pro[4] == "4z"
    assert pro[-1] == "32z"
    gstack = layer_map_of("g_stack", 6, 24, {})
    assert [o.source for o in gstack] == [*range(6)] * 4


def test_whole_origins():
    old, z = LayerOrigin(0, is_new=False), LayerOrigin(0, is_new=True, branch_scale=0.0)
    assert layer_map_of("llama_pro", 1, 2, {}) == (old, z)
    random = dataclasses.replace(z, init="random", branch_scale=0.25)
    assert layer_map_of("random_top", 1, 2, {"scale": 0.25}) == (old, random)
    silent = LayerOrigin(0, is_new=True, init="identity", silent=True)
    assert layer_map_of("staged", 1, 2, {}) == (old, silent)
    copied = dataclasses.replace(silent, init="duplicate")
    assert layer_map_of("staged", 1, 2, {"matrices": "copy"}) == (old, copied)
    assert layer_map_of("post_ln_identity", 2, 4, {"after": [0, 0]}) == (
        dataclasses.replace(old, plain_norms=("mlp",)),
        dataclasses.replace(z, plain_norms=("attention", "mlp")),
        dataclasses.replace(z, plain_norms=("attention",)),
        LayerOrigin(1, is_new=False),
    )


SCALED = ("lag", "last", "random_top", "progressive", "g_stack", "midas", "interpolate", "slices")


@st.composite
def growths(draw_):
    """(operator, source, target, options) of a growth that exists."""
    source = draw_(st.integers(1, 8))
    operator = draw_(st.sampled_from(sorted(set(OPERATORS) - {"identity"})))
    divisors = [n for n in range(1, source + 1) if source % n == 0]
    new = {
        "progressive": st.just(source),
        "staged": st.just(source),
        "g_stack": st.integers(1, 3).map(lambda g: g * source),
        "midas": st.sampled_from(divisors),
        "llama_pro": st.sampled_from(divisors),
        "interpolate": st.integers(1, 20),
        "slices": st.integers(1, 20),
        "post_ln_identity": st.integers(1, 20),
    }.get(operator, st.integers(1, source))
    target = source + draw_(new)
    options = {}
    layer = st.integers(0, source - 1)
    if operator == "lag":
        options = {
            "index": draw_(st.integers(0, 2 * source - target)),
            "block_size": draw_(st.sampled_from([1, target - source])),
            "init": draw_(st.sampled_from(["duplicate", "random"])),
        }
    if operator == "staged":
        options = {
            "placement": draw_(st.sampled_from(["alternate", "append"])),
            "matrices": draw_(st.sampled_from(["identity", "copy"])),
        }
    if operator == "slices":
        options = {"layers": draw_(st.lists(layer, min_size=target, max_size=target))}
    if operator == "post_ln_identity":
        count = target - source
        options = {"after": draw_(st.lists(layer, min_size=count, max_size=count))}
    if operator in SCALED and draw_(st.booleans()):
        options["scale"] = draw_(st.sampled_from([0, 0.0, 0.25, 1, 1.0]))
    return operator, source, target, options


@given(growths())
def test_invariants(growth):
    operator, source, target, options = growth
    layer_map = layer_map_of(operator, source, target, options)
    assert len(layer_map) == target
    old = [o.source for o in layer_map if not o.is_new]
    new = [o for o in layer_map if o.is_new]
    if operator == "slices":
        assert sorted(old) == sorted(set(options["layers"]))
        assert [o.source for o in layer_map] == options["layers"]
    else:
        assert old == list(range(source))
        assert len(new) == target - source
    scale = 0.0 if operator in ("llama_pro", "post_ln_identity") else options.get("scale", 1.0)
    assert all(o.branch_scale == scale for o in new)
    assert all(o.branch_scale == 1 and o.init == "duplicate" for o in layer_map if not o.is_new)
    # A duplicate never comes before what it duplicates.
    for place, origin in enumerate(layer_map):
        if origin.is_new and origin.init == "duplicate":
            assert origin.source in [o.source for o in layer_map[:place]]
    assert any(o.plain_norms for o in layer_map) == (operator == "post_ln_identity")
    assert all(o.silent == (operator == "staged") for o in new)
    assert not any(o.silent for o in layer_map if not o.is_new)


@given(growths())
def test_plans_survive_json_and_say_no_defaults(growth):
    operator, source, target, options = growth
    plan = GrowthPlan(
        operator=operator, options=options, source_layers=source, target_layers=target
    )
    back = GrowthPlan.from_json(plan.to_json())
    assert (back, back.digest) == (plan, plan.digest)
    assert back.options == options


@given(growths(), st.sampled_from(["pre", "post"]))
def test_preserves_function_by_the_rule_in_words(growth, position):
    operator, source, target, options = growth
    plan = GrowthPlan(
        operator=operator, options=options, source_layers=source, target_layers=target
    )
    if operator == "post_ln_identity":
        expected = position == "post"
    elif operator == "slices":  # new layers are zero only if asked for, and none may be moved
        firsts = list(dict.fromkeys(options["layers"]))
        expected = position == "pre" and options.get("scale") == 0 and firsts == [*range(source)]
    else:
        expected = position == "pre" and (
            operator in ("llama_pro", "staged") or options.get("scale") == 0
        )
    assert plan.preserves_function(position) is expected


def test_identity_preserves_whatever_the_norms():
    plan = GrowthPlan(operator="identity", source_layers=4, target_layers=4)
    assert plan.preserves_function("pre") is plan.preserves_function("post") is True
    assert plan.preserves_function() is True


SLICES_46 = ("slices", 4, 6)


@pytest.mark.parametrize(
    ("operator", "source", "target", "options", "message"),
    [
        ("identity", 4, 6, {}, r"'identity' keeps .* so 4 cannot become 6\. Give 4 layers"),
        ("identity", 4, 4, {"scale": 0}, r"'identity' has no option scale"),
        ("progressive", 4, 7, {}, r"'progressive' doubles .*: 4 become 8, not 7\. Give 8 layers"),
        ("g_stack", 4, 10, {}, r"10 is not a multiple of 4 layers\. Nearest: 8 or 12\."),
        ("g_stack", 4, 6, {}, r"6 is not a multiple of 4 layers\. Nearest: 8\."),
        ("midas", 6, 10, {}, r"4 new .* do not divide the 6 old ones\. .*targets: 7, 8, 9, 12\."),
        ("midas", 4, 12, {}, r"8 new .* do not divide the 4 old ones\. .*targets: 5, 6, 8\."),
        ("llama_pro", 6, 11, {}, r"'llama_pro': the 5 new .*Allowed targets: 7, 8, 9, 12\."),
        ("llama_pro", 6, 8, {"scale": 0}, "'llama_pro' has no option scale"),
        ("staged", 4, 7, {}, r"'staged' doubles .*: 4 become 8, not 7\. Give 8 .* 'llama_pro'"),
        ("staged", 4, 4, {}, "the target must have more"),
        (
            "staged",
            4,
            8,
            {"placement": "top"},
            r"placement must be alternate or append \(got 'top'",
        ),
        ("staged", 4, 8, {"matrices": 1}, r"matrices must be identity or copy \(got 1\)"),
        ("staged", 4, 8, {"query_groups": 0}, r"query_groups must be 1 or more \(got 0\)"),
        ("staged", 4, 8, {"query_groups": "2"}, r"query_groups must be a whole .*\(got '2'\)"),
        ("staged", 4, 8, {"scale": 0}, "'staged' has no option scale"),
        ("post_ln_identity", 6, 11, {}, r"the 5 new layers of 6 -> 11 do not divide the 6 old"),
        ("post_ln_identity", 4, 6, {"after": [0]}, "after lists 1 layers, but 2 are new"),
        ("post_ln_identity", 4, 6, {"after": [0, 4]}, "after names layer 4, .* are 0 to 3"),
        ("post_ln_identity", 4, 6, {"after": [0, -1]}, "after names layer -1, .* are 0 to 3"),
        ("post_ln_identity", 4, 6, {"after": 3}, "after must be a list of layers or text"),
        ("post_ln_identity", 4, 6, {"after": [0, "1"]}, r"each item of after .*\(got '1'\)"),
        (*SLICES_46, {}, "'slices' needs the option layers"),
        (*SLICES_46, {"layers": "0-3"}, "layers lists 4 layers, but the target has 6"),
        (*SLICES_46, {"layers": "0-3,3-4"}, r"names layer 4, .* 0 to 3 \(0-based\)"),
        (*SLICES_46, {"layers": "0-3,2-1"}, r"rising ranges .*\(got '2-1' in '0-3,2-1'\)"),
        (*SLICES_46, {"layers": "0-3,"}, r"rising ranges .*\(got '' in '0-3,'\)"),
        (*SLICES_46, {"layers": "a"}, r"rising ranges .*\(got 'a' in 'a'\)"),
        (*SLICES_46, {"layers": "-1"}, r"rising ranges .*\(got '-1' in '-1'\)"),
        (*SLICES_46, {"layers": [0, True]}, r"each item of layers must be a whole .*\(got True\)"),
        (*SLICES_46, {"layers": {"a": 1}}, r"list of layers or text like '0-3,2-5' \(got {'a"),
        *(
            (name, 4, 8, {**options, "scale": bad}, f"operator '{name}': scale must be a number")
            for name, options in {
                "lag": {"index": 0, "block_size": 1, "init": "random"},
                "slices": {"layers": "0-3,0-3"},
                **{key: {} for key in SCALED if key not in ("lag", "slices")},
            }.items()
            for bad in (-0.1, 1.01, True, "0.5", None, float("nan"))
        ),
    ],
)
def test_what_is_refused(operator, source, target, options, message):
    with pytest.raises(PlanError, match=message) as caught:
        layer_map_of(operator, source, target, options)
    assert "\n" not in str(caught.value)


# What the maps do to tensors

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


def groups_of(layers, *, post="pre_", only=lambda layer, name: True):
    names = {name.format(post=post): shape for name, shape in TENSORS.items()}
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
        name = template.format(post="pre_")
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
    with pytest.raises(PlanError, match=r"'llama_pro' needs .*linear_proj.* have none"):
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
            name = template.format(post="pre_")
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
