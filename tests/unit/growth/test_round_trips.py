"""Over random topologies, file for file: there and back is where one was, in whatever order."""

import itertools
import tempfile
from pathlib import Path

import torch
from full_state import tree_differences
from hypothesis import given, settings
from hypothesis import strategies as st

from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.apply.grown_state import resharded, retarget
from lag_megatron.growth.plan import GrowthPlan

TOPOLOGIES = st.builds(
    dict,
    zero_stage=st.integers(0, 3),
    data_size=st.integers(1, 6),
    tensor_size=st.sampled_from([1, 2, 4]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
)
PLANS = st.sampled_from(
    [
        ("lag", 3, {"index": 0, "block_size": 1, "init": "duplicate", "scale": 0.5}),
        ("lag", 4, {"index": 0, "block_size": 2, "init": "random"}),
        ("last", 3, {}),
        ("interpolate", 5, {}),
        ("llama_pro", 4, {}),
        ("slices", 3, {"layers": "1,0-1"}),
        ("staged", 4, {"placement": "append"}),
    ]
)


def topology_of(source, choice):
    return retarget(
        ZeroCheckpoint.open(source).topology,
        world_size=choice["data_size"] * choice["tensor_size"],
        tensor_size=choice["tensor_size"],
        zero_stage=choice["zero_stage"],
        precision=choice["precision"],
    )


def move(source, target, topology):
    growth = resharded(ZeroCheckpoint.open(source), topology)
    grow_checkpoint(source, target, growth.plan, topology=topology, workers=2)


def same(one, other):
    names = sorted(path.name for path in one.glob("*.pt"))
    assert names
    assert names == sorted(path.name for path in other.glob("*.pt"))
    for name in names:
        pair = [torch.load(folder / name, weights_only=False) for folder in (one, other)]
        for objects in pair:
            objects.pop("ds_config")  # says nothing of the source, but keeps an empty section more
        assert [d for d in tree_differences(*pair) if not d.startswith("/lag/")] == [], name


@settings(max_examples=15)
@given(TOPOLOGIES)
def test_there_and_back(checkpoint, choice):
    with tempfile.TemporaryDirectory() as folder:
        there, back = Path(folder) / "there", Path(folder) / "back"
        move(checkpoint, there, topology_of(checkpoint, choice))
        move(there, back, ZeroCheckpoint.open(checkpoint).topology)
        same(checkpoint, back)


@settings(max_examples=15)
@given(TOPOLOGIES, PLANS)
def test_grown_then_moved_is_moved_then_grown(checkpoint, choice, chosen):
    operator, layers, options = chosen
    plan = GrowthPlan(operator=operator, options=options, source_layers=2, target_layers=layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        topology = topology_of(checkpoint, choice)
        grow_checkpoint(checkpoint, folder / "grown", plan)
        move(folder / "grown", folder / "grown-moved", topology)
        move(checkpoint, folder / "moved", topology)
        grow_checkpoint(folder / "moved", folder / "moved-grown", plan)
        grow_checkpoint(checkpoint, folder / "at once", plan, topology=topology)
        for one, other in itertools.pairwise(["grown-moved", "moved-grown", "at once"]):
            same(folder / one, folder / other)
