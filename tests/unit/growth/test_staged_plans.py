"""Staged training's operator in plans, pools and the tool: models that it takes, or refuses."""

import json

import pytest
from programs import grow
from staged_plans import groups_of, plan_of

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config import GrowthConfig, PoolConfig
from lag_megatron.errors import PlanError
from lag_megatron.growth.growth_map import depth_map
from lag_megatron.growth.operators.layer_map import format_layer_map
from lag_megatron.growth.pool import build_pool


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
    assert (only.id, format_layer_map(only.plan.layer_map)) == ("staged", "1 2 3 I I I")
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
    assert list(manifest.find_corrupted_files(tmp_path / "out" / "step3")) == []
    (history,) = ZeroCheckpoint.open(tmp_path / "out" / "step3").client_state["growth_history"]
    assert history["options"] == {"placement": "append"}
    assert grow(checkpoint, tmp_path / "dry", *staged, "--dry-run") == 0
    assert "preserves the function: yes" in capsys.readouterr().out
    assert grow(checkpoint, tmp_path / "no", *staged, "--set", "query_groups=2") == 2
    assert "query_groups is 2, but the checkpoint's model has 4" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
