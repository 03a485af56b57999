"""``--names``: what the programs for checkpoints make of it, and what they refuse."""

import json

import pytest
import torch
from programs import grow, inspect, program
from safetensors.torch import save_file

from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint

convert = program("convert_checkpoint")
RANDOM = ("--operator", "random_top", "--layers", 3)


@pytest.fixture
def names(tmp_path):
    def write(text):
        (tmp_path / "names.yaml").write_text(text)
        return "--names", tmp_path / "names.yaml"

    return write


def test_inspect_says_what_it_took(checkpoint, names, capsys):
    assert inspect(checkpoint) == 0
    assert "  model       2 layers (decoder.layers.N), " in capsys.readouterr().out
    assert inspect(checkpoint, "--json", *names('layers: "decoder.layers.{}"')) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layers"] == 2
    assert facts["layer_stacks"] == [{"name": "decoder.layers.N", "layers": 2}]


def test_inspect_names_both_of_two_stacks(names, tmp_path, capsys):
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "t5"}')
    sizes = {"encoder.block.0.w": 4, "encoder.block.1.w": 4, "decoder.block.0.w": 6}
    tensors = {name: torch.ones(size) for name, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors")
    assert inspect(folder) == 0
    both = "layers: 2 (encoder.block.N) or 1 (decoder.block.N); --names says which to grow"
    assert both in capsys.readouterr().out
    assert inspect(folder, *names('layers: "encoder.block.{}"')) == 0
    assert "2 layers (encoder.block.N), " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roles: {'*.norm9.weight': bias}", "'*.norm9.weight' of the names matches no parameter"),
        ("roles: {'*.linear_fc1.*': bias, '*.mlp.*': bias}", "both match decoder.layers.0.mlp."),
        ("roles: {'*.bias': biass}", "unknown role 'biass'"),
        ("layers: 'transformer.h.{}'", "numbered lists: decoder.layers.{}"),
        ("roles: {", "cannot be read as YAML"),
        ("roles: {a: bias, a: head}", "given twice"),
    ],
)
def test_mistakes(text, message, checkpoint, names, tmp_path, capsys):
    given = names(text)
    copy = ("--operator", "last", "--layers", 3)
    for run in (
        lambda: inspect(checkpoint, *given),
        lambda: grow(checkpoint, tmp_path / "out", *RANDOM, *given),
        lambda: grow(checkpoint, tmp_path / "out", *copy, *given),
        lambda: convert(checkpoint, tmp_path / "out", "--to", "universal", *copy, *given),
    ):
        assert run() == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_names_stay_in_the_history(checkpoint, names, tmp_path):
    given = names("roles: {'*.linear_fc1.weight': fixed}")
    assert grow(checkpoint, tmp_path / "out", *RANDOM, *given) == 0
    assert grow(checkpoint, tmp_path / "bare", *RANDOM) == 0
    (named,) = ZeroCheckpoint.open(tmp_path / "out" / "step3").client_state["growth_history"]
    (bare,) = ZeroCheckpoint.open(tmp_path / "bare" / "step3").client_state["growth_history"]
    assert named == bare | {"names": {"roles": {"*.linear_fc1.weight": "fixed"}, "layers": None}}
    assert grow(tmp_path / "out", tmp_path / "more", "--operator", "last", "--layers", 4) == 0
    assert inspect(tmp_path / "more") == 0


def test_a_plan_says_everything(checkpoint, names, tmp_path, capsys):
    (tmp_path / "plan.json").write_text("{}")
    given = names("roles: {'*.bias': bias}")
    assert grow(checkpoint, tmp_path / "out", "--plan", tmp_path / "plan.json", *given) == 2
    assert "--plan says everything" in capsys.readouterr().err
