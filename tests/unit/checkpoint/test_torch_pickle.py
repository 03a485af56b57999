"""DeepSpeed's files without DeepSpeed, and DeepSpeed's classes where it is there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_ranks

from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.errors import CheckpointError

WITHOUT = """
import sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "megatron"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.plan import GrowthPlan

source, target, further = map(Path, sys.argv[1:])
options = {"index": 0, "block_size": 1, "init": "random"}
for layers, old, new in ((2, source, target), (3, target, further)):
    plan = GrowthPlan(
        operator="lag", options=options, source_layers=layers, target_layers=layers + 1
    )
    grow_checkpoint(old, new, plan)
states = ZeroCheckpoint.open(further).optimizer_states(0, 1)["optimizer_state_dict"]
print(type(states["loss_scaler"]).__name__, states["loss_scaler"].cur_scale, states["zero_stage"])
"""


def test_reads_writes_and_reads_again_without_deepspeed_and_megatron(checkpoint, tmp_path):
    further = tmp_path / "further" / "step3"
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT, checkpoint, tmp_path / "once", further],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["LossScaler", "1.0", "1"]
    assert run_ranks(_classes, 1, checkpoint) == run_ranks(_classes, 1, further)


def _classes(path):
    """Every class in an optimizer file as DeepSpeed itself reads it, and a slice's address."""
    file = path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    states = torch.load(file, weights_only=False)["optimizer_state_dict"]
    slices = states["param_slice_mappings"][0]
    address = next(iter(slices.values()))
    assert address.numel > 0
    assert states["loss_scaler"].loss_scale == 1
    assert states["zero_stage"].name == "optimizer_states"
    return [f"{type(o).__module__}.{type(o).__qualname__}"
            for o in (states["loss_scaler"], states["zero_stage"], slices, address)]  # fmt: skip


def test_every_kind_of_object_comes_back(tmp_path):
    scaler = torch_pickle.DynamicLossScaler()
    scaler.cur_scale = 2.0
    objects = {
        "scaler": scaler,
        "stage": torch_pickle.ZeroStage.weights,
        "address": torch_pickle.FragmentAddress(3, 4),
        "shape": torch.Size([2, 3]),
        "numbers": [1, 2.5, None, True, "text", b"bytes", (1, 2)],
        "tensor": torch.empty(2, 3, dtype=torch.bfloat16),
    }
    mapped = torch_pickle.create(tmp_path / "file.pt", objects)
    mapped["tensor"].fill_(1.5)
    del mapped
    back = torch_pickle.load(tmp_path / "file.pt")
    assert (back["scaler"].cur_scale, back["stage"]) == (2.0, torch_pickle.ZeroStage.weights)
    assert (back["address"].numel, back["address"].start) == (3, 4)
    assert back["shape"] == (2, 3)
    assert back["numbers"] == objects["numbers"]
    assert torch.equal(back["tensor"], torch.full((2, 3), 1.5, dtype=torch.bfloat16))


class Foreign:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_foreign_objects_are_refused_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Foreign()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="holds objects that no DeepSpeed checkpoint has"):
        torch_pickle.load(tmp_path / "file.pt")
    assert not (tmp_path / "touched").exists()


def test_reading_never_writes_to_the_file(tmp_path):
    torch.save({"tensor": torch.zeros(4)}, tmp_path / "file.pt")
    torch_pickle.load(tmp_path / "file.pt")["tensor"].fill_(1.0)
    assert torch.equal(torch.load(tmp_path / "file.pt")["tensor"], torch.zeros(4))


def test_members_of_enumerations_as_python_3_11_0_to_3_11_3_pickle_them(tmp_path, monkeypatch):
    def by_name(self, protocol):
        return getattr, (type(self), self.name)

    monkeypatch.setattr(torch_pickle.ZeroStage, "__reduce_ex__", by_name)
    path = tmp_path / "states.pt"
    torch.save(
        {"stage": torch_pickle.ZeroStage.weights}, path, pickle_module=torch_pickle._Pickling
    )
    assert b"getattr" in path.read_bytes()
    assert torch_pickle.load(path)["stage"] is torch_pickle.ZeroStage.weights


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch_pickle.LossScaler, "__init__"),
        (torch_pickle.ZeroStage, "mro"),
        (torch.float32, "__class__"),
    ],
)
def test_getattr_of_anything_else_is_refused(owner, name, tmp_path):
    class Reach:
        def __reduce_ex__(self, protocol):
            return getattr, (owner, name)

    path = tmp_path / "states.pt"
    torch.save({"x": Reach()}, path, pickle_module=torch_pickle._Pickling)
    with pytest.raises(CheckpointError, match="holds objects that no DeepSpeed checkpoint has"):
        torch_pickle.load(path)
