"""Unusual but possible checkpoints: grown rightly, or refused by name."""

import dataclasses
import shutil

import pytest
import torch
from test_grow_zero_errors import MODEL, SHARD, change, plan

from lag_megatron.checkpoint.state.layout import Topology, make_layout
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.writer import file_writer
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.apply.grown_state import GrownState, resharded, retarget
from lag_megatron.growth.growth_map import grown_names
from lag_megatron.growth.plan import GrowthPlan


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint without a manifest."""
    path = shutil.copytree(checkpoint, tmp_path / "source" / "step3")
    (path / manifest.MANIFEST).unlink()
    return path


@pytest.fixture
def unpartitioned(checkpoint, tmp_path):
    """The same state under ZeRO-0, without a manifest."""
    source = ZeroCheckpoint.open(checkpoint)
    path = tmp_path / "zero0" / "step3"
    growth = resharded(source, retarget(source.topology, zero_stage=0))
    grow_checkpoint(checkpoint, path, growth.plan, topology=growth.topology)
    (path / manifest.MANIFEST).unlink()
    return path


def test_two_stacks_of_layers_are_not_mixed():
    names = [f"{stack}.layers.{n}.w" for stack in ("encoder", "decoder") for n in (0, 1)]
    with pytest.raises(PlanError, match=r"2 stacks of layers \(decoder.layers., encoder.layers.\)"):
        list(grown_names(names, plan().layer_map))


def test_an_empty_view_of_a_tensor_shifts_nothing(copy, tmp_path):
    def add(objects):
        module = {"nothing": torch.randn(7)[:0], **objects["module"]}
        objects["module"] = module
        objects["buffer_names"] = ["nothing"]

    change(copy / MODEL, add)
    grow_checkpoint(copy, tmp_path / "a", plan())
    grown = torch.load(tmp_path / "a" / MODEL, weights_only=False)["module"]
    old = torch.load(copy / MODEL, weights_only=False)["module"]
    name = "decoder.layers.{}.mlp.linear_fc1.weight"
    assert torch.equal(grown[name.format(2)], old[name.format(1)])
    assert grown["nothing"].numel() == 0


def test_growing_a_changed_source_into_the_same_place_is_refused(copy, tmp_path):
    grow_checkpoint(copy, tmp_path / "a", plan())
    grow_checkpoint(copy, tmp_path / "a", plan())  # asked for twice
    change(copy / SHARD, lambda objects: None)
    with pytest.raises(PlanError, match="exists already"):
        grow_checkpoint(copy, tmp_path / "a", plan())


def test_a_result_that_lost_a_file_is_not_called_finished(checkpoint, tmp_path):
    grow_checkpoint(checkpoint, tmp_path / "a", plan())
    (tmp_path / "a" / SHARD).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARD}: missing"):
        grow_checkpoint(checkpoint, tmp_path / "a", plan())


def test_options_that_json_changes_are_the_same_growth(checkpoint, tmp_path):
    slices = GrowthPlan(
        operator="slices", options={"layers": (0, 1, 1)}, source_layers=2, target_layers=3
    )
    grow_checkpoint(checkpoint, tmp_path / "a", slices)
    grow_checkpoint(checkpoint, tmp_path / "a", slices)


def test_more_than_adam_is_refused_without_zero_too(unpartitioned, tmp_path):
    def amsgrad(objects):
        for entry in objects["optimizer"]["state"].values():
            entry["max_exp_avg_sq"] = entry["exp_avg_sq"].clone()

    change(unpartitioned / MODEL, amsgrad)
    with pytest.raises(CheckpointError, match="keeps max_exp_avg_sq beside Adam's moments"):
        grow_checkpoint(unpartitioned, tmp_path / "a", plan())


def test_steps_that_differ_within_a_group_are_refused(unpartitioned, tmp_path):
    change(unpartitioned / MODEL, lambda o: o["optimizer"]["state"][1]["step"].sub_(2))
    with pytest.raises(CheckpointError, match=r"group 0 have taken \[1, 3\] steps"):
        grow_checkpoint(unpartitioned, tmp_path / "a", plan())


def test_a_tensor_that_is_not_contiguous_is_read_in_its_order(unpartitioned, tmp_path):
    name = "decoder.final_layernorm.weight"

    def spread(objects):
        values = objects["module"][name]
        objects["module"][name] = torch.stack([values, values + 1], 1)[:, 0]
        assert objects["module"][name].stride() == (2,)

    before = torch.load(unpartitioned / MODEL, weights_only=False)["module"][name].clone()
    change(unpartitioned / MODEL, spread)
    grow_checkpoint(unpartitioned, tmp_path / "a", plan())
    grown = torch.load(tmp_path / "a" / MODEL, weights_only=False)["module"][name]
    assert torch.equal(grown, before)


def test_the_size_of_sub_groups_goes_with_the_checkpoint(checkpoint, tmp_path):
    source = ZeroCheckpoint.open(checkpoint)
    target = dataclasses.replace(source.topology, zero_stage=3, sub_group_size=300)
    grow_checkpoint(checkpoint, tmp_path / "a", plan(), topology=target)
    grown = ZeroCheckpoint.open(tmp_path / "a")
    grown.check_every_file()
    assert grown.topology == target
    assert len(grown.layout.subgroups) > 2


def test_names_that_no_rule_cuts_keep_their_tensor_parallel_size(copy, tmp_path):
    def rename(name):
        return name.replace("self_attention.linear_qkv", "attention.q_proj")

    def foreign(objects):
        objects["module"] = {rename(n): t for n, t in objects["module"].items()}
        objects["param_shapes"] = [
            {rename(n): s for n, s in group.items()} for group in objects["param_shapes"]
        ]

    change(copy / MODEL, foreign)
    for rank in (0, 1):
        shard = copy / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        change(shard, lambda o: o["optimizer_state_dict"].pop("param_slice_mappings"))
    source = ZeroCheckpoint.open(copy)
    target = retarget(source.topology, world_size=4, tensor_size=2)
    with pytest.raises(PlanError, match=r"how tensor parallelism cuts .*attention\.q_proj\.weight"):
        grow_checkpoint(copy, tmp_path / "a", plan(), topology=target)
    grow_checkpoint(copy, tmp_path / "b", plan())


def test_a_disk_that_fails_while_writing_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    calls = 0

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(5, "Input/output error")
        return pwrite(*arguments)

    pwrite = file_writer.os.pwrite
    monkeypatch.setattr(file_writer.os, "pwrite", failing)
    growth = GrownState(ZeroCheckpoint.open(checkpoint), plan())
    with pytest.raises(CheckpointError, match="cannot write: Input/output error"):
        growth.write_rank(tmp_path, tensor_rank=0, data_rank=0)
    assert list(tmp_path.iterdir()) == []
    calls = 0
    with pytest.raises(CheckpointError, match="cannot write: Input/output error"):
        grow_checkpoint(checkpoint, tmp_path / "a", plan())
    assert list(tmp_path.iterdir()) == []


def test_planning_for_512_ranks_costs_no_memory_for_each():
    groups = [{f"decoder.layers.{n}.w{i}": (999, 1023) for n in range(40) for i in range(9)}]
    topology = Topology(zero_stage=3, data_size=512, tensor_size=1, precision="bf16")
    layout = make_layout(groups, topology)
    ((container, parts),) = layout.buffers_of_rank(511).items()
    assert len(parts) == 360
    name, segment = parts[100]
    assert layout.segments[name][511] == segment
    assert list(layout.overlapping(name, segment.start - 1, 3))[-1] == segment
    assert sum(part.length for part in layout.segments[name]) == 999 * 1023
    assert layout.lengths[container] == 360 * -(-999 * 1023 // 512)
