"""The depth operators: their maps by hand, what holds of every map, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lag_megatron.errors import PlanError
from lag_megatron.growth.operators import OPERATORS, layer_map_of
from lag_megatron.growth.operators.layer_map import LayerOrigin, format_layer_map
from lag_megatron.growth.plan import GrowthPlan

LAG = {"index": 1, "block_size": 2, "init": "duplicate"}


def drawn(operator, source, target, **options):
    return format_layer_map(layer_map_of(operator, source, target, options))


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
    silenced = LayerOrigin(0, is_new=True, init="identity", zero_norms=True)
    assert layer_map_of("staged", 1, 2, {}) == (old, silenced)
    copied = dataclasses.replace(silenced, init="duplicate")
    assert layer_map_of("staged", 1, 2, {"matrices": "copy"}) == (old, copied)
    assert layer_map_of("post_ln_identity", 2, 4, {"after": [0, 0]}) == (
        dataclasses.replace(old, identity_norms=("mlp",)),
        dataclasses.replace(z, identity_norms=("attention", "mlp")),
        dataclasses.replace(z, identity_norms=("attention",)),
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
    assert any(o.identity_norms for o in layer_map) == (operator == "post_ln_identity")
    assert all(o.zero_norms == (operator == "staged") for o in new)
    assert not any(o.zero_norms for o in layer_map if not o.is_new)


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
