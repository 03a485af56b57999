"""What the tests of conversions share: small models of transformers, and changes of their files."""

import json
import shutil

import torch
from hf_weights import VOCABULARY, hf_model
from programs import program
from safetensors.torch import load_file, save_file

convert = program("convert_checkpoint")
FAMILIES = ("bert", "gpt2", "llama")
EXACT = ("--vocab-size", VOCABULARY)


def save_families(tmp_path_factory):
    """A fixture, never to be changed: {family: (its model of transformers, its directory)}."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = hf_model(family)
        model.save_pretrained(folder, max_shard_size="20KB")
        found[family] = (model, folder)
    return found


def copy_llama(families, tmp_path):
    """A fixture: a copy of the Llama's directory."""
    return shutil.copytree(families["llama"][1], tmp_path / "llama")


def load_weights(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def as_pickle(folder):
    weights = load_weights(folder)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def rewrite(folder, change):
    """Change the weights of a directory, and keep them in one file."""
    weights = load_weights(folder)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    weights = change(weights) or weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def settings(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(capsys, code, *arguments):
    assert convert(*arguments) == code
    return capsys.readouterr().err
