"""NaN and infinities in a source: refused where values are read, wherever they lie."""

import math
import shutil

import pytest
import torch
from converting import convert
from programs import grow, inspect, program

import lag_megatron as lag
from lag_megatron.checkpoint.state.finite import all_finite, nonfinite_values
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint

SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
GROWN = ("--operator", "lag", "--set", "index=0", "--set", "block_size=1", "--set",
         "init=duplicate", "--layers", 3)  # fmt: skip
respread = program("respread_checkpoint")


def changed(checkpoint, folder, change):
    """A copy of the checkpoint without a manifest, in which ``change`` altered rank 1's shard."""
    path = shutil.copytree(checkpoint, folder / "source" / "step3")
    (path / manifest.MANIFEST).unlink()
    states = torch.load(path / SHARD, weights_only=False)
    with torch.no_grad():
        change(states["optimizer_state_dict"])
    torch.save(states, path / SHARD)
    return path


def with_nan(inner):
    """Two NaN in a master of rank 1 and an infinity in a second moment."""
    inner["single_partition_of_fp32_groups"][0][5:7] = math.nan
    state = inner["base_optimizer_state"]["state"][0]
    state["exp_avg_sq"][9] = math.inf


@pytest.fixture
def source(checkpoint, tmp_path):
    return changed(checkpoint, tmp_path, with_nan)


def place_of(source, offset):
    """The parameter at an offset of rank 1's first buffer, and the index in it."""
    layout = ZeroCheckpoint.open(source).layout
    for name, part in layout.segments_of_rank(1):
        if part.container.key == 0 and part.offset <= offset < part.offset + part.length:
            index = torch.unravel_index(
                torch.tensor(part.start + offset - part.offset), layout.shapes[name]
            )
            return name, [int(i) for i in index]
    raise AssertionError(offset)


def test_all_are_found(source):
    found = list(nonfinite_values(ZeroCheckpoint.open(source)))
    name, index = place_of(source, 5)
    assert [(f.state, f.data_rank, f.tensor_rank, f.count) for f in found] == [
        ("fp32", 1, 0, 2),
        ("exp_avg_sq", 1, 0, 1),
    ]
    assert (found[0].parameter, list(found[0].index)) == (name, index)
    assert (found[1].parameter, list(found[1].index)) == place_of(source, 9)
    assert math.isnan(found[0].value)
    assert found[1].value == math.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda s, t: grow(s, t, *GROWN),
        lambda s, t: respread(s, t, "--world-size", 1, "--zero-stage", 3),
        lambda s, t: convert(s, t, "--to", "zero"),
        lambda s, t: convert(s, t, "--to", "universal"),
        lambda s, t: convert(s, t, "--to", "megatron"),
        lambda s, t: convert(s, t, "--to", "hf"),
    ],
    ids=["grow", "respread", "zero", "universal", "megatron", "hf"],
)
def test_every_way_that_reads_values_refuses_them(call, source, tmp_path, capsys):
    target = tmp_path / "target"
    assert call(source, target) == 2
    message = capsys.readouterr().err
    name, index = place_of(source, 5)
    words = f"{name}: the weight has 2 values that are not finite, the first (nan) at index {index}"
    assert f"{words}, on data-parallel rank 1 of tensor-parallel rank 0. " in message
    assert "--allow-nonfinite" in message
    assert not (target / "latest").exists()
    assert not any(manifest.is_committed(path) for path in target.rglob("*") if path.is_dir())


def test_allowed_on_demand(source, tmp_path):
    target = tmp_path / "target"
    assert grow(source, target, *GROWN, "--allow-nonfinite") == 0
    grown = ZeroCheckpoint.open(target / "step3")
    assert {found.state for found in nonfinite_values(grown)} == {"fp32", "exp_avg_sq"}
    lag.convert(target, tmp_path / "u", to="universal", allow_nonfinite=True, verify=True)


def test_padding_may_hold_anything(checkpoint, tmp_path):
    def padding(inner):
        for group, values in enumerate(inner["single_partition_of_fp32_groups"]):
            state = inner["base_optimizer_state"]["state"][group]
            state["exp_avg"][len(values) :] = math.nan

    source = changed(checkpoint, tmp_path, padding)
    assert grow(source, tmp_path / "target", *GROWN) == 0
    assert all(
        all_finite(values)
        for file in (tmp_path / "target" / "step3").glob("*optim_states.pt")
        for entry in torch.load(file, weights_only=False)["optimizer_state_dict"][
            "base_optimizer_state"
        ]["state"].values()
        for values in (entry["exp_avg"], entry["exp_avg_sq"])
    )


def test_values_beyond_the_precision_of_the_target(checkpoint, tmp_path, capsys):
    def large(inner):
        inner["single_partition_of_fp32_groups"][0][5] = 1e5  # fp16 ends at 65,504

    source = changed(checkpoint, tmp_path, large)
    name, _ = place_of(source, 5)
    assert convert(source, tmp_path / "half", "--to", "hf", "--dtype", "fp16") == 2
    assert f"{name} has values beyond 65504, the largest of float16" in capsys.readouterr().err
    assert convert(source, tmp_path / "model", "--to", "hf", "--dtype", "bf16") == 0


def test_inspect_reads_them(source, checkpoint, capsys):
    assert inspect(source, "--verify", "--json") == 1
    printed = capsys.readouterr().out
    assert "the weight has 2 values that are not finite" in printed
    assert "Adam's second moment has 1 value that is not finite" in printed
    assert inspect(checkpoint, "--verify", "--json") == 0
    assert '"values": "finite"' in capsys.readouterr().out


def test_large_values_are_finite():
    assert all_finite(torch.full((10,), 3e38))
    assert all_finite(torch.full((10,), 6e4, dtype=torch.float16))
    assert not all_finite(torch.tensor([math.inf, -math.inf]))
    assert not all_finite(torch.tensor([1.0, math.nan], dtype=torch.bfloat16))
    assert all_finite(torch.tensor([1, 2]))
