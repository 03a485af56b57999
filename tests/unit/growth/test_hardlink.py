"""Grown checkpoints that share their source's bytes hold what growing by copying gives."""

import json
import os
import shutil

import pytest
import torch
from conftest import sparing
from foreign_checkpoints import torch_dist, universal
from programs import grow, inspect

from lag_megatron.checkpoint.open import describe_any, open_checkpoint, resolve_checkpoint
from lag_megatron.checkpoint.state.layout import STATES
from lag_megatron.checkpoint.state.source import UNSHARDED
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.cli import convert_checkpoint
from lag_megatron.growth.apply.conversion import unsharded_state
from lag_megatron.growth.apply.grown_state import GrownState, resharded
from lag_megatron.growth.plan import GrowthPlan

PLANS = {
    "duplicate": {"operator": "lag", "options": {"index": 0, "block_size": 1, "init": "duplicate"}},
    "random": {"operator": "lag", "options": {"index": 1, "block_size": 1, "init": "random"}},
    "silent": {
        "operator": "lag",
        "options": {"index": 0, "block_size": 1, "init": "duplicate", "scale": 0.0},
    },
}


@pytest.fixture(scope="module")
def sources(checkpoint, tmp_path_factory):
    """One checkpoint of two layers in each format that can be linked; never to be changed."""
    folder = tmp_path_factory.mktemp("sources")
    for form in ("universal", "megatron"):
        arguments = [checkpoint, folder / form, "--to", form]
        assert convert_checkpoint.main([str(a) for a in arguments]) == 0
    return folder


def link(source, target, operator, options, layers, *more):
    settings = [x for key, value in options.items() for x in ("--set", f"{key}={value}")]
    asked = ("--link", "--operator", operator, *settings, "--layers", layers)
    return grow(source, target, *asked, *more)


def require_grown(source, target, operator, options, layers):
    """Every element of the linked checkpoint is what the plan makes of the source."""
    plan = GrowthPlan(operator=operator, options=options, source_layers=2, target_layers=layers)
    expected = unsharded_state(GrownState(open_checkpoint(source), plan, UNSHARDED))
    found = unsharded_state(resharded(open_checkpoint(target), UNSHARDED))
    assert found.shapes == expected.shapes
    for name, shape in expected.shapes.items():
        size = torch.Size(shape).numel()
        for state in STATES:
            # As bits: Megatron's fixture has weights that nobody has drawn, NaN among them.
            values = (w.read(name, state, 0, size).view(torch.int32) for w in (found, expected))
            assert torch.equal(*values), (name, state)


def shared(tag):
    files = manifest.read_manifest(tag)["files"]
    return {name for name, entry in files.items() if manifest.SHARED in entry}


@pytest.mark.parametrize("layers", sparing([3, 4], slow=lambda layers: layers == 4))
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("form", ["universal", "megatron"])
def test_what_is_linked_is_what_growing_makes(form, plan, layers, sources, tmp_path, capsys):
    options = {**PLANS[plan]["options"], "block_size": 1 if layers == 3 else 2, "index": 0}
    source, target = sources / form, tmp_path / "grown"
    assert link(source, target, "lag", options, layers) == 0
    require_grown(source, target, "lag", options, layers)
    tag = resolve_checkpoint(target)
    for name in shared(tag):
        assert (tag / name).stat().st_nlink > 1
    capsys.readouterr()
    assert inspect(target, "--verify") == 0
    printed = capsys.readouterr().out
    assert f"{len(shared(tag))} of {len(manifest.read_manifest(tag)['files'])} files" in printed
    assert inspect(source, "--verify") == 0


def test_a_duplicate_writes_next_to_nothing(sources, tmp_path):
    for form in ("universal", "megatron"):
        target = tmp_path / form
        assert link(sources / form, target, "lag", PLANS["duplicate"]["options"], 3) == 0
        tag = resolve_checkpoint(target)
        values = [
            path for path in tag.rglob("*") if path.suffix in (".pt", ".distcp")
            and path.name not in ("common.pt", "optimizer_state.pt")
            and not path.name.startswith("mp_rank")
        ]  # fmt: skip
        assert values
        assert all(path.stat().st_nlink > 1 for path in values)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_checkpoints_of_megatron_itself(homogeneous, tmp_path):
    """Two ranks' pieces in files of many tensors, with training arguments beside."""
    metadata = {} if homogeneous else {"non_homogeneous_layers": True}
    source = tmp_path / "iter_0000007"
    source.mkdir()
    torch_dist(source, metadata)
    for name in ("duplicate", "random"):
        target = tmp_path / name
        options = PLANS[name]["options"]
        assert link(source, target, "lag", options, 3) == 0
        require_grown(source, target, "lag", options, 3)
        tag = target / "iter_0000007"
        assert (target / "latest_checkpointed_iteration.txt").read_text() == "7"
        common = torch.load(tag / "common.pt", weights_only=False)
        assert common["args"].num_layers == 3
        assert common["args"].model_type.name == "encoder_or_decoder"
        assert describe_any(tag)["problems"] == []
        assert describe_any(tag)["layers"] == 3


def test_a_universal_checkpoint_of_deepspeed_itself(tmp_path):
    source = universal(tmp_path / "old", 3)
    assert link(source, tmp_path / "new", "lag", PLANS["duplicate"]["options"], 3) == 0
    require_grown(source, tmp_path / "new", "lag", PLANS["duplicate"]["options"], 3)


def test_refusals(sources, checkpoint, tmp_path, capsys, monkeypatch):
    options = PLANS["duplicate"]["options"]
    assert link(checkpoint, tmp_path / "a", "lag", options, 3) == 2
    assert "has no file or entry for each tensor" in capsys.readouterr().err
    assert link(sources / "universal", tmp_path / "a", "lag", options, 3, "--zero-stage", 3) == 2
    assert "--link keeps the topology" in capsys.readouterr().err

    def elsewhere(source, target):
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", elsewhere)
    assert link(sources / "universal", tmp_path / "a", "lag", options, 3) == 2
    assert "Linked growth needs a target on the source's file system" in capsys.readouterr().err
    assert [p for p in (tmp_path / "a").rglob("*") if p.is_file()] == []


def test_a_changed_source_is_seen_in_both(sources, tmp_path, capsys):
    """What is shared is one file: damage is damage to both, and reported for both."""
    source = shutil.copytree(sources / "universal", tmp_path / "source")
    assert link(source, tmp_path / "grown", "lag", PLANS["duplicate"]["options"], 3) == 0
    tag = tmp_path / "grown" / "step3_universal"
    name = sorted(n for n in shared(tag) if n.endswith("exp_avg.pt"))[0]
    data = bytearray((tag / name).read_bytes())
    data[len(data) // 2] ^= 1
    with (tag / name).open("r+b") as file:
        file.write(data)
    capsys.readouterr()
    for path in (source, tmp_path / "grown"):
        assert inspect(path, "--verify", "--json") == 1
        problems = json.loads(capsys.readouterr().out)["problems"]
        assert any("content differs from its checksum" in problem for problem in problems)
