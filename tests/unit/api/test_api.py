"""The functions of ``import lag_megatron as lag`` for checkpoints on disk."""

import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
from conftest import ROOT
from full_state import tree_differences
from programs import grow as grow_program
from programs import program

import lag_megatron as lag
from lag_megatron.checkpoint.open import open_checkpoint
from lag_megatron.errors import LagError

LAG = {"operator": "lag", "layers": 3, "index": 0, "block_size": 1, "init": "duplicate"}
OPTIONS = ("--operator", "lag", "--set", "index=0", "--set", "block_size=1",
           "--set", "init=duplicate", "--layers", 3)  # fmt: skip


def same_files(here, there):
    """Whether two directories have the same files but for their manifests' paths."""
    names = sorted(p.name for p in here.iterdir())
    assert names == sorted(p.name for p in there.iterdir())
    return all(
        (here / name).read_bytes() == (there / name).read_bytes()
        for name in names
        if name.endswith(".pt")
    )


def test_importing_it_brings_no_torch_until_a_function_is_used():
    code = (
        "import sys, lag_megatron as lag; lag.GrowthPlan, lag.UserError, dir(lag); "
        "print('torch' in sys.modules); lag.inspect; print('deepspeed' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_every_exported_name_exists():
    assert all(hasattr(lag, name) for name in lag.__all__)
    assert set(dir(lag)) >= {*lag.__all__}
    assert lag.UserError is LagError
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lag.nothing  # noqa: B018


def test_the_plan_of_a_checkpoint_takes_its_depth_and_deviation(checkpoint):
    plan = lag.GrowthPlan.for_checkpoint(str(checkpoint), **LAG)
    assert (plan.source_layers, plan.target_layers, plan.init_std) == (2, 3, 0.02)
    assert plan.options == {"index": 0, "block_size": 1, "init": "duplicate"}
    assert plan == lag.GrowthPlan.for_checkpoint(checkpoint.parent, **LAG)
    copies = {key: value for key, value in LAG.items() if key != "init"}  # the default
    assert plan == lag.GrowthPlan.for_checkpoint(checkpoint, **copies)
    other = lag.GrowthPlan.for_checkpoint(checkpoint, **LAG, init_std=0.1, seed=5, moments="zero")
    assert (other.init_std, other.seed, other.moments) == (0.1, 5, "zero")
    with pytest.raises(lag.PlanError, match="index"):
        lag.GrowthPlan.for_checkpoint(checkpoint, **LAG | {"index": 9})


def test_grow_writes_what_the_program_writes(checkpoint, tmp_path):
    plan, counts = lag.GrowthPlan.for_checkpoint(checkpoint, **LAG), []
    topology = {"world_size": 3, "zero_stage": 3, "precision": "bf16"}
    written = lag.grow(
        checkpoint, tmp_path / "api", plan, **topology, workers=2, progress=counts.append
    )
    assert written == tmp_path / "api" / "step3"
    assert (tmp_path / "api" / "latest").read_text() == "step3"
    arguments = ("--world-size", 3, "--zero-stage", 3, "--precision", "bf16")
    assert grow_program(checkpoint, tmp_path / "program", *OPTIONS, *arguments) == 0
    assert same_files(written, tmp_path / "program" / "step3")
    assert sum(counts) > 0


def test_grow_without_a_plan_only_moves_to_other_ranks(checkpoint, tmp_path):
    there = lag.grow(checkpoint, tmp_path / "a", world_size=3)
    assert lag.inspect(there).topology["data_parallel"] == 3
    back = lag.grow(there, tmp_path / "b", world_size=2)
    assert tree_differences(*(lag.inspect(p).optimizer for p in (checkpoint, back))) == []
    assert lag.inspect(back).history == []


def test_what_is_wrong_is_an_error_and_nothing_is_written(checkpoint, tmp_path, capsys):
    plan = lag.GrowthPlan.for_checkpoint(checkpoint, **LAG)
    for wrong, text in (
        ({"workers": 0}, "workers: expected"),
        ({"world_size": 3, "tensor_parallel": 2}, "cannot be split"),
        ({"tensor_parallel": 3, "world_size": 3}, "3"),
    ):
        with pytest.raises(lag.UserError, match=text):
            lag.grow(checkpoint, tmp_path / "out", plan, **wrong)
    with pytest.raises(lag.CheckpointError, match="no such checkpoint"):
        lag.grow(tmp_path / "nowhere", tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_convert_writes_what_the_program_writes(checkpoint, tmp_path):
    written = lag.convert(checkpoint, tmp_path / "api", to="universal", verify=True)
    assert written == tmp_path / "api" / "step3_universal"
    program("convert_checkpoint")(checkpoint, tmp_path / "program", "--to", "universal")
    other = tmp_path / "program" / "step3_universal"
    assert [f.read_bytes() for f in sorted(written.rglob("fp32.pt"))] == [
        f.read_bytes() for f in sorted(other.rglob("fp32.pt"))
    ]
    plan = lag.GrowthPlan.for_checkpoint(written, **LAG)
    grown = lag.convert(written, tmp_path / "grown", to="zero", plan=plan, world_size=2)
    assert open_checkpoint(grown).topology.zero_stage == 1
    assert lag.inspect(grown, verify=True).layers == 3


def test_inspect_gives_a_dataclass(checkpoint, tmp_path):
    plan = lag.GrowthPlan.for_checkpoint(checkpoint, **LAG)
    info = lag.inspect(lag.grow(checkpoint, tmp_path, plan))
    assert (info.format, info.step, info.layers, info.problems) == ("zero", 3, 3, [])
    assert info.topology["precision"] == "fp32"
    assert info.path == tmp_path / "step3"
    assert [entry["operator"] for entry in info.history] == ["lag"]
    assert "lr" in info.optimizer[0]
    with pytest.raises(FrozenInstanceError):
        info.step = 4


def test_inspect_lists_the_problems_of_a_damaged_checkpoint(checkpoint, tmp_path):
    written = lag.grow(checkpoint, tmp_path, world_size=1)
    (written / "mp_rank_00_model_states.pt").unlink()
    info = lag.inspect(written)
    assert (info.step, info.layers, info.topology) == (None, None, {})
    assert "missing" in info.problems[0]
    with pytest.raises(lag.CheckpointError, match="no checkpoint"):
        lag.inspect(ROOT / "docs")


@pytest.mark.parametrize("function", [lag.grow, lambda *a, **k: lag.convert(*a, to="hf", **k)])
def test_an_option_that_does_not_exist_is_refused(function, checkpoint, tmp_path):
    with pytest.raises(TypeError, match="unexpected options: world_sise"):
        function(checkpoint, tmp_path / "target", world_sise=3)
    assert not (tmp_path / "target").exists()
