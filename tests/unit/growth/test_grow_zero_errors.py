"""Damaged, foreign and mixed checkpoints: one clear error each, and nothing left behind."""

import errno
import os
import shutil
import subprocess

import pytest
import torch

from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero import file_names, reader
from lag_megatron.checkpoint.zero.header import resolve_tag
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.plan import GrowthPlan

MODEL = "mp_rank_00_model_states.pt"
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def plan(source=2, target=3):
    options = {"index": 0, "block_size": 1, "init": "duplicate"}
    return GrowthPlan(operator="lag", options=options, source_layers=source, target_layers=target)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint as another program would leave it: without a manifest."""
    path = shutil.copytree(checkpoint, tmp_path / "source" / "step3")
    (path / manifest.MANIFEST).unlink()
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target" / "step3"


def change(path, edit):
    """Rewrite a file of a checkpoint after ``edit`` of its objects; runs DeepSpeed's classes."""
    objects = torch.load(path, weights_only=False)
    edit(objects)
    torch.save(objects, path)


def refused(source, target, match, error=CheckpointError, growth=None):
    with pytest.raises(error, match=match) as caught:
        grow_checkpoint(source, target, growth or plan())
    assert "Traceback" not in str(caught.value)
    assert not target.exists()
    assert not manifest.temporary(target).exists()
    assert not (target.parent / "latest").exists()


@pytest.mark.parametrize("name", [MODEL, SHARD])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file(copy, target, name, share):
    os.truncate(copy / name, int((copy / name).stat().st_size * share))
    refused(copy, target, rf"{name}: damaged or cut short \(\d+ bytes\).*Restore it")


def test_a_truncated_file_of_a_committed_checkpoint(checkpoint, tmp_path, target):
    path = shutil.copytree(checkpoint, tmp_path / "source")
    os.truncate(path / SHARD, 1000)
    refused(path, target, rf"{SHARD}: 1000 bytes, but \d+ were written")


def test_a_damaged_manifest(checkpoint, tmp_path, target):
    path = shutil.copytree(checkpoint, tmp_path / "source")
    (path / manifest.MANIFEST).write_text("{")
    refused(path, target, "damaged")
    (path / manifest.MANIFEST).write_text('{"format": 99}')
    refused(path, target, "format 99 is not 1")


@pytest.mark.parametrize("name", [SHARD, "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_missing_shard(copy, target, name):
    (copy / name).unlink()
    refused(copy, target, rf"1 of 3 files are missing \({name}\)")


def test_no_checkpoint_at_all(tmp_path, target):
    refused(tmp_path / "nothing", target, "not a DeepSpeed checkpoint")
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        resolve_tag(tmp_path / "nothing")
    (tmp_path / "latest").write_text("step9")
    (tmp_path / "step3").mkdir()
    with pytest.raises(CheckpointError, match=r"'step9'.*does not exist.*Tags there: step3"):
        resolve_tag(tmp_path)


def test_a_shard_of_another_step(copy, target):
    def later(objects):
        for entry in objects["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            entry["step"] += 1

    change(copy / SHARD, later)
    refused(copy, target, rf"{SHARD}: of step \[4, 4\], but .* \[3, 3\].*mixed")


def test_files_that_are_not_deepspeeds(copy, target):
    torch.save([1, 2], copy / SHARD)
    refused(copy, target, rf"{SHARD}: not written by DeepSpeed")
    torch.save({"state_dict": {}}, copy / MODEL)
    refused(copy, target, rf"{MODEL}: not written by DeepSpeed")
    torch.save({"ds_version": "0.1"}, copy / MODEL)
    refused(copy, target, rf"{MODEL}: has no entry 'dp_world_size'")
    (copy / MODEL).write_text("hello")
    refused(copy, target, rf"{MODEL}: damaged or cut short \(5 bytes\)")


def test_an_optimizer_that_is_not_adam(copy, target):
    def forget(objects):
        for entry in objects["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            del entry["exp_avg_sq"]

    change(copy / SHARD, forget)
    refused(copy, target, r"exp_avg_sq of buffer 0 is missing.*Only Adam's")


@pytest.mark.parametrize("missing", [1, 2])
def test_buffers_of_another_length(copy, target, missing):
    def shorten(objects):
        masters = objects["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        masters[0] = masters[0][:-missing].clone()

    change(copy / SHARD, shorten)
    refused(copy, target, r"fp32 of buffer 0 has \d+ elements, but its parameters take \d+")


def test_orders_that_are_not_understood(copy, target):
    def round_robin(objects):
        objects["ds_config"]["zero_optimization"]["round_robin_gradients"] = True

    change(copy / MODEL, round_robin)
    refused(copy, target, "round_robin_gradients, which orders flat buffers")


def test_another_number_of_layers(copy, target):
    wrong = plan(source=3, target=4)
    refused(copy, target, "has 2 layers, but the plan grows from 3", PlanError, wrong)


def test_layers_that_differ(copy, target):
    def widen(objects):
        name = "decoder.layers.1.mlp.linear_fc1.weight"
        group = objects["param_shapes"][0]
        group[name] = torch.Size([16, 32])

    change(copy / MODEL, widen)
    refused(copy, target, "layer 1 has other parameters than layer 0", PlanError)


def test_an_existing_target_is_left_alone(copy, target):
    target.mkdir(parents=True)
    (target / "mine").touch()
    with pytest.raises(PlanError, match="exists already"):
        grow_checkpoint(copy, target, plan())
    assert [p.name for p in target.iterdir()] == ["mine"]


def test_the_same_growth_twice_is_done_once(copy, target):
    grow_checkpoint(copy, target, plan())
    before = (target / manifest.MANIFEST).stat().st_mtime_ns
    (target.parent / "latest").unlink()
    grow_checkpoint(copy, target, plan())
    assert (target.parent / "latest").read_text() == "step3"
    assert (target / manifest.MANIFEST).stat().st_mtime_ns == before
    other = GrowthPlan(operator="last", source_layers=2, target_layers=3)
    with pytest.raises(PlanError, match="exists already"):
        grow_checkpoint(copy, target, other)


def test_a_target_that_cannot_be_written(copy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write there: Not a directory"):
        grow_checkpoint(copy, tmp_path / "file" / "step3", plan())


def test_too_little_space_is_seen_before(copy, target, monkeypatch):
    usage = shutil.disk_usage(copy)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(copy, target, "needs .* KiB, but only 1.0 KiB are free.*nothing was written")


def test_a_disk_that_fills_up_on_the_way(copy, target, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(copy, target, "cannot write: No space left on device")


@pytest.mark.parametrize("size_kib", [4, 16, 40, 100, 160])
def test_a_disk_that_is_really_full(copy, tmp_path, monkeypatch, size_kib):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    try:
        refused(copy, folder / "step3", "only .* are free|No space left")
        monkeypatch.setattr(manifest, "require_space", lambda *a, **k: None)
        refused(copy, folder / "step3", "cannot write( there)?: (No space left|the disk is full)")
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_sources_are_never_changed(checkpoint, target):
    grow_checkpoint(checkpoint, target, plan())
    assert list(manifest.find_corrupted_files(checkpoint)) == []
    assert list(manifest.find_corrupted_files(target)) == []


def test_a_flipped_bit_is_found_by_the_checksums(checkpoint, target):
    grow_checkpoint(checkpoint, target, plan())
    data = bytearray((target / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (target / SHARD).write_bytes(data)
    assert list(manifest.find_corrupted_files(target)) == [
        f"{SHARD}: content differs from its checksum"
    ]
    (target / MODEL).unlink()
    (target / SHARD).write_bytes(b"")
    assert sorted(manifest.find_corrupted_files(target)) == [
        f"{MODEL}: missing",
        f"{SHARD}: 0 bytes, expected {len(data)}",
    ]


def test_names_of_files():
    topology = Topology(zero_stage=3, data_size=11, tensor_size=2, precision="bf16")
    names = file_names.files_of(topology)
    assert len(names) == len(set(names)) == 44
    assert "zero_pp_rank_10_mp_rank_01_model_states.pt" in names
    assert "bf16_zero_pp_rank_10_mp_rank_01_optim_states.pt" in names


def test_files_are_checked_once(checkpoint, monkeypatch):
    opened = ZeroCheckpoint.open(checkpoint)
    opened.optimizer_states(0, 1)
    monkeypatch.setattr(reader, "require_buffer_lengths", pytest.fail)
    opened.optimizer_states(0, 1)
