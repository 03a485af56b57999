"""The two programs for checkpoints: what they print, write and refuse, and their exit codes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from full_state import tree_differences
from programs import grow, inspect

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.growth.plan import GrowthPlan

SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
LAG = ("--operator", "lag", "--set", "index=0", "--set", "block_size=1", "--set", "init=duplicate")


def test_grows_a_tag_and_points_latest_to_it(checkpoint, tmp_path, capsys):
    assert grow(checkpoint, tmp_path / "out", *LAG, "--layers", 3) == 0
    printed = capsys.readouterr()
    assert "layers 2 -> 3: 1 1* 2\n" in printed.out
    assert printed.err == ""
    assert (tmp_path / "out" / "latest").read_text() == "step3"
    grown = ZeroCheckpoint.open(tmp_path / "out" / "step3")
    (history,) = grown.client_state["growth_history"]
    assert history["target_layers"] == 3
    assert history["init_std"] == 0.02
    assert list(manifest.find_corrupted_files(tmp_path / "out" / "step3")) == []


def test_takes_the_folder_with_latest_and_grows_again(checkpoint, tmp_path):
    assert grow(checkpoint.parent, tmp_path / "a", "--operator", "last", "--layers", 3) == 0
    assert grow(tmp_path / "a", tmp_path / "b", "--operator", "random_top", "--layers", 5) == 0
    state = ZeroCheckpoint.open(tmp_path / "b" / "step3").client_state
    assert [plan["operator"] for plan in state["growth_history"]] == ["last", "random_top"]
    assert state["num_layers"] == 5


def test_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    assert grow(checkpoint, tmp_path / "out", *LAG, "--layers", 3, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "1 1* 2" in printed
    assert "to write: 0." in printed
    assert "time at this disk's rate: " in printed
    assert "preserves the function: no" in printed
    assert not (tmp_path / "out").exists()


def test_another_topology_without_growth_and_back_gives_the_same_files(
    checkpoint, tmp_path, capsys
):
    there = ("--world-size", 6, "--tensor-parallel", 2, "--zero-stage", 3, "--precision", "bf16")
    assert grow(checkpoint, tmp_path / "a", *there, "--workers", 3) == 0
    printed = capsys.readouterr().out
    assert "ranks ZeRO-1, 2 data-parallel x 1 tensor-parallel, fp32 -> " in printed
    assert "-> ZeRO-3, 3 data-parallel x 2 tensor-parallel, bf16" in printed
    moved = ZeroCheckpoint.open(tmp_path / "a" / "step3")
    assert (moved.topology.data_size, moved.topology.tensor_size) == (3, 2)
    assert moved.client_state["growth_history"] == []
    back = ("--world-size", 2, "--tensor-parallel", 1, "--zero-stage", 1, "--precision", "fp32")
    assert grow(tmp_path / "a", tmp_path / "b", *back) == 0
    for path in sorted(checkpoint.glob("*.pt")):
        one, other = (
            torch.load(f, weights_only=False) for f in (path, tmp_path / "b" / "step3" / path.name)
        )
        one.pop("lag", None), other.pop("lag", None)
        one.pop("ds_config"), other.pop("ds_config")
        assert tree_differences(one, other) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world-size", 3, "--tensor-parallel", 2), "3 ranks cannot be split into"),
        (("--world-size", 0), "--world-size: expected a whole number from 1"),
        (("--world-size", 8, "--tensor-parallel", 8), "does not divide the model's 4 query groups"),
        (("--world-size", 2, "--workers", 0), "--workers: expected a whole number from 1"),
        (("--operator", "identity", "--layers", 3), "identity"),
    ],
)
def test_impossible_topologies_are_refused(checkpoint, tmp_path, capsys, arguments, message):
    assert grow(checkpoint, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plan_file_says_everything(checkpoint, tmp_path, capsys):
    options = {"index": 0, "block_size": 2, "init": "random"}
    plan = GrowthPlan(
        operator="lag", options=options, source_layers=2, target_layers=4, seed=5, moments="zero"
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert grow(checkpoint, tmp_path / "out", "--plan", tmp_path / "plan.json") == 0
    found = manifest.read_manifest(tmp_path / "out" / "step3")
    assert found["plan_digest"] == plan.digest
    assert GrowthPlan(**found["plan"]) == plan
    assert grow(checkpoint, tmp_path / "o", "--plan", tmp_path / "plan.json", "--seed", 1) == 2
    assert "--plan says everything" in capsys.readouterr().err


def test_options_reach_the_plan(checkpoint, tmp_path):
    extra = ("--moments", "zero", "--seed", 9, "--init-std", 0.5)
    assert grow(checkpoint, tmp_path / "out", *LAG, "--layers", 4, *extra) == 0
    plan = manifest.read_manifest(tmp_path / "out" / "step3")["plan"]
    assert (plan["moments"], plan["seed"], plan["init_std"]) == ("zero", 9, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--operator is missing"),
        (("--operator", "lag"), "--layers is missing"),
        (("--operator", "lagg", "--layers", 3), "unknown operator 'lagg'. Known: identity, lag,"),
        (("--operator", "lag", "--layers", 3), "needs the option"),
        ((*LAG, "--layers", 2), "cannot grow 2 layers to 2"),
        ((*LAG, "--layers", 5), "Largest target: 4"),
        ((*LAG, "--set", "index=7", "--layers", 3), "index 7 is out of range"),
        ((*LAG, "--set", "index=x", "--layers", 3), "index must be a whole number (got 'x')"),
        ((*LAG, "--set", "index", "--layers", 3), "expected KEY=VALUE"),
        ((*LAG, "--set", "index=[", "--layers", 3), "it cannot be read as YAML"),
        ((*LAG, "--set", "blocksize=1", "--layers", 3), "has no option blocksize"),
        (("--plan", "nowhere.json"), "nowhere.json: expected a growth plan"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(checkpoint, tmp_path, capsys, arguments, message):
    assert grow(checkpoint, tmp_path / "out", *arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_wrong_paths_exit_2(checkpoint, tmp_path, capsys):
    assert grow(tmp_path / "none", tmp_path / "out", *LAG, "--layers", 3) == 2
    assert "no such checkpoint directory" in capsys.readouterr().err
    assert grow(tmp_path, tmp_path / "out", *LAG, "--layers", 3) == 2
    assert "not a DeepSpeed checkpoint" in capsys.readouterr().err
    assert grow(checkpoint, checkpoint.parent, *LAG, "--layers", 3) == 2
    assert "Name a target outside of it" in capsys.readouterr().err
    assert list(manifest.find_corrupted_files(checkpoint)) == []
    for path in (tmp_path / "none", tmp_path):
        assert inspect(path) == 2
    with pytest.raises(SystemExit) as caught:
        grow(checkpoint, tmp_path / "out", "--layers", "many")
    assert caught.value.code == 2


def test_inspect_says_what_there_is(checkpoint, capsys):
    assert inspect(checkpoint) == 0
    printed = capsys.readouterr().out
    for line in (
        "ZeRO-1, fp32",
        "2 data-parallel x 1 tensor-parallel",
        "step 3, 96 tokens",
        "2 layers",
        "committed   yes",
        "weight_decay=0.1",
        "weight_decay=0.0",
    ):
        assert line in printed


def test_inspect_as_json(checkpoint, tmp_path, capsys):
    grow(checkpoint, tmp_path / "out", *LAG, "--layers", 3)
    capsys.readouterr()
    assert inspect(tmp_path / "out", "--json", "--verify") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["topology"] == {
        "zero_stage": 1,
        "data_parallel": 2,
        "tensor_parallel": 1,
        "precision": "fp32",
    }
    hidden, ffn, vocabulary, length, layers = 16, 32, 64, 8, 3
    matrices = 4 * hidden * hidden + 2 * hidden * ffn
    vectors = 4 * hidden + 3 * hidden + hidden + ffn + hidden
    embeddings = (vocabulary + length) * hidden + 2 * hidden
    assert facts["parameters"] == layers * (matrices + vectors) + embeddings
    assert (facts["layers"], facts["step"], facts["tokens"]) == (3, 3, 96)
    assert facts["growth_history"][0]["operator"] == "lag"
    assert facts["sound"] is True
    assert facts["problems"] == []
    assert [group["weight_decay"] for group in facts["optimizer"]] == [0.1, 0.0]
    assert facts["bytes"] == sum(facts["files"].values())
    assert SHARD in facts["files"]


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_verify_without_a_manifest_is_not_sound(copy, capsys):
    (copy / manifest.MANIFEST).unlink()
    assert inspect(copy) == 0
    assert "unverified" in capsys.readouterr().out
    assert inspect(copy, "--verify") == 1
    assert "unverified" in capsys.readouterr().err


def test_a_flipped_bit_is_found_by_verify_alone(copy, capsys):
    data = bytearray((copy / SHARD).read_bytes())
    data[len(data) // 2] ^= 16
    (copy / SHARD).write_bytes(data)
    assert inspect(copy) == 0
    capsys.readouterr()
    assert inspect(copy, "--verify", "--json") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["problems"] == [f"{SHARD}: content differs from its checksum"]
    assert SHARD in printed.err


@pytest.mark.parametrize("verify", [(), ("--verify",)])
def test_damage_is_not_sound(copy, capsys, verify):
    os.truncate(copy / SHARD, 500)
    assert inspect(copy, *verify) == 1
    assert "500 bytes" in capsys.readouterr().err
    (copy / SHARD).unlink()
    assert inspect(copy, *verify) == 1
    assert "missing" in capsys.readouterr().err
    (copy / manifest.MANIFEST).write_text("{")
    assert inspect(copy, *verify) == 1
    assert "manifest.json: expected a checkpoint's manifest" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["grow_checkpoint", "inspect_checkpoint"])
def test_help_and_errors_as_programs(tool, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, f"tools/{tool}.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    assert run("--help").returncode == 0
    wrong = run(tmp_path / "none", *(["x"] if tool.startswith("grow") else []))
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
