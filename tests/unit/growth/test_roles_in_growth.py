"""Growth of models whose names no table has: copies of any, the rest by the user's names."""

import re

import pytest
import torch
import yaml
from torch import nn

from lag_megatron.checkpoint.state.layout import STATES
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import PlanError
from lag_megatron.growth.growth_map import Copy, depth_map, growth_map_of
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.weight_init import Constant, Normal

HIDDEN, INNER, LAYERS = 4, 6, 11
ROLES = {
    "blocks.*.ln?.weight": "norm_weight",
    "blocks.*.ln_2.weight": "norm_weight",
    "blocks.*.qk.norm.weight": "norm_weight_zero_centred",
    "blocks.*.bias": "bias",
    "blocks.*.in_proj_bias": "bias",
    "blocks.*.attn.in_proj_weight": "branch_input",
    "blocks.*.attn.out_proj.weight": "branch_output",
    "blocks.*.up.weight": "branch_input",
    "blocks.*.down": "branch_output",
    "blocks.*.down_offset": "branch_output",
    "blocks.*.gamma": "layer_scale",
    "blocks.*.slopes": "fixed",
}


class Block(nn.Module):
    """A layer of nobody's: LayerScale, a projection that is a bare parameter, norms of any name."""

    def __init__(self):
        super().__init__()
        self.ln1, self.ln_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn = nn.MultiheadAttention(HIDDEN, 2)
        self.qk = nn.ModuleDict({"norm": nn.RMSNorm(HIDDEN)})
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Parameter(torch.zeros(HIDDEN, INNER))
        self.down_offset = nn.Parameter(torch.zeros(HIDDEN))
        self.gamma = nn.Parameter(torch.ones(HIDDEN))
        self.slopes = nn.Parameter(torch.ones(2))


MODEL = nn.ModuleDict(
    {"embed": nn.Embedding(8, HIDDEN), "blocks": nn.ModuleList(Block() for _ in range(LAYERS))}
)
SHAPES = {name: tuple(parameter.shape) for name, parameter in MODEL.named_parameters()}
TAILS = [name.removeprefix("blocks.0.") for name in SHAPES if name.startswith("blocks.0.")]
RANDOM = {"index": 0, "block_size": 1, "init": "random"}
COPY = {"index": 0, "block_size": 1, "init": "duplicate"}


def plan_of(operator="lag", target=LAYERS + 1, *, names=None, **options):
    return GrowthPlan(
        operator=operator,
        options=options,
        source_layers=LAYERS,
        target_layers=target,
        init_std=0.5,
        names=names,
    )


def sources(growth, layer):
    prefix = f"blocks.{layer}."
    return {
        name.removeprefix(prefix): blocks[0].sources
        for name, blocks in growth.blocks.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(**RANDOM),
        plan_of(**COPY, scale=0.5),
        plan_of("random_top"),
        plan_of("last", scale=0),
        plan_of("llama_pro", 2 * LAYERS),
    ],
    ids=lambda plan: f"{plan.operator}{plan.options.get('scale', '')}",
)
def test_a_role_that_is_not_known_is_asked_for(plan):
    with pytest.raises(PlanError) as caught:
        depth_map(plan, [SHAPES])
    text = str(caught.value)
    assert "--names" in text
    lines = text[text.index("roles:") :]
    for tail in TAILS:
        assert re.search(rf'"blocks\.\S+\.{re.escape(tail)}": ROLE', lines), tail
    assert "embed" not in lines
    # What is printed is a names file in which only the words are missing.
    printed = yaml.safe_load(lines.replace("ROLE", "fixed"))
    assert len(printed["roles"]) >= len(TAILS)
    roles = {p: "branch_output" if p.endswith(".down") else "fixed" for p in printed["roles"]}
    depth_map(
        plan_of(plan.operator, plan.target_layers, names={"roles": roles}, **plan.options), [SHAPES]
    )


def test_a_part_of_the_roles_leaves_the_rest_to_be_asked_for():
    some = {p: r for p, r in ROLES.items() if "down" not in p}
    with pytest.raises(PlanError) as caught:
        depth_map(plan_of(names={"roles": some}, **RANDOM), [SHAPES])
    lines = str(caught.value).partition("roles:\n")[2].splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        '"blocks.*.down"',
        '"blocks.*.down_offset"',
    ]


def test_fresh_layers_by_the_users_roles():
    growth = depth_map(plan_of(names={"roles": ROLES}, **RANDOM), [SHAPES])
    new = {tail: states["fp32"] for tail, states in sources(growth, 1).items()}
    drawn = {tail: source for tail, source in new.items() if isinstance(source, Normal)}
    scaled = pytest.approx(0.5 / (2 * 12) ** 0.5)
    assert {tail: source.std for tail, source in drawn.items()} == {
        "attn.in_proj_weight": 0.5,
        "attn.out_proj.weight": scaled,
        "up.weight": 0.5,
        "down": scaled,
    }
    assert {tail: s.value for tail, s in new.items() if isinstance(s, Constant)} == {
        "ln1.weight": 1.0,
        "ln_2.weight": 1.0,
        "qk.norm.weight": 0.0,
        "ln1.bias": 0.0,
        "ln_2.bias": 0.0,
        "attn.in_proj_bias": 0.0,
        "attn.out_proj.bias": 0.0,
        "up.bias": 0.0,
        "down_offset": 0.0,
    }
    assert {tail: s for tail, s in new.items() if isinstance(s, Copy)} == {
        "gamma": Copy("blocks.0.gamma", (0,)),
        "slopes": Copy("blocks.0.slopes", (0,)),
    }
    assert all(s["fp32"] == Copy(f"blocks.1.{t}", (0,) * len(SHAPES[f"blocks.1.{t}"]))
               for t, s in sources(growth, 2).items())  # fmt: skip


def test_a_scale_acts_on_the_outputs_that_the_user_names():
    plan = plan_of(names={"roles": ROLES}, **COPY, scale=0.25)
    found = {
        tail: sources["fp32"].scale
        for tail, sources in sources(depth_map(plan, [SHAPES]), 1).items()
    }
    outputs = {"attn.out_proj.weight", "attn.out_proj.bias", "down", "down_offset"}
    assert {tail for tail, scale in found.items() if scale == 0.25} == outputs
    assert {scale for tail, scale in found.items() if tail not in outputs} == {1.0}


def test_copies_ask_for_nothing():
    for operator, target, options in (("lag", LAYERS + 1, COPY), ("last", LAYERS + 2, {})):
        growth = depth_map(plan_of(operator, target, **options), [SHAPES])
        for blocks in growth.blocks.values():
            assert set(map(type, blocks[0].sources.values())) == {Copy}
    kept = growth_map_of(plan_of("identity", LAYERS), [SHAPES], {})
    assert kept.groups == [SHAPES]


@pytest.mark.parametrize("operator", ["staged", "post_ln_identity"])
def test_operators_on_norms_need_a_table(operator):
    plan = plan_of(operator, 2 * LAYERS, names={"roles": ROLES})
    with pytest.raises(PlanError, match=rf"'{operator}' .*Roles do not say it.*blocks\.N"):
        depth_map(plan, [SHAPES])


def test_scaling_needs_an_output():
    roles = {p: "fixed" for p in ROLES}
    with pytest.raises(PlanError, match=r"no parameter .*blocks\.N.* role branch_output"):
        depth_map(plan_of("llama_pro", 2 * LAYERS, names={"roles": roles}), [SHAPES])


def test_names_that_do_not_fit_are_refused_for_copies_too():
    for plan in (plan_of(**COPY, names={"roles": {"*.ln7": "bias"}}),
                 plan_of("identity", LAYERS, names={"roles": {"*.ln7": "bias"}})):  # fmt: skip
        with pytest.raises(PlanError, match=r"'\*\.ln7' .*matches no parameter"):
            growth_map_of(plan, [SHAPES], {})


def test_two_stacks_are_grown_one_at_a_time():
    shapes = {f"{half}.block.{i}.w": (4, 4) for half in ("encoder", "decoder") for i in range(2)}

    def plan(operator="last", target=3, **more):
        return GrowthPlan(operator=operator, source_layers=2, target_layers=target, **more)

    with pytest.raises(PlanError, match=r"encoder\.block\.N with 2, decoder\.block\.N with 2"):
        depth_map(plan(), [shapes])
    growth = depth_map(plan(names={"layers": "decoder.block.{}"}), [shapes])
    assert list(growth.groups[0]) == [
        "encoder.block.0.w",
        "encoder.block.1.w",
        "decoder.block.0.w",
        "decoder.block.1.w",
        "decoder.block.2.w",
    ]
    assert growth_map_of(plan("identity", 2), [shapes], {}).groups == [shapes]


def test_lists_inside_layers_move_with_them():
    shapes = {f"layers.{i}.experts.{e}.w": (2, 2) for i in range(2) for e in range(3)}
    plan = GrowthPlan(operator="last", source_layers=2, target_layers=3)
    growth = depth_map(plan, [shapes])
    for expert in range(3):
        (block,) = growth.blocks[f"layers.2.experts.{expert}.w"]
        copied = Copy(f"layers.1.experts.{expert}.w", (0, 0))
        assert block.sources == dict.fromkeys(STATES, copied)


def test_names_are_part_of_the_plan():
    bare, named = plan_of(**COPY), plan_of(**COPY, names={"roles": {"*.gamma": "layer_scale"}})
    assert named.names == ParamNames({"*.gamma": "layer_scale"})
    assert bare.digest == "1ccab045c21b5a12"  # as before there were names
    assert named.digest != bare.digest
    assert "names" not in bare.to_dict()
    for plan in (bare, named):
        assert GrowthPlan(**plan.to_dict()) == plan
        assert GrowthPlan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="unknown role"):
        plan_of(**COPY, names={"roles": {"a": "norm"}})
