"""Checkpoints in which two sources give one thing: the index decides, or they are refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from converting import EXACT, as_pickle, convert, load_weights, refused, rewrite, save_families
from programs import grow, inspect
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.errors import CheckpointError

families = pytest.fixture(save_families, scope="module")
INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def llama(families, tmp_path):
    return shutil.copytree(families["llama"][1], tmp_path / "llama")


def written(folder, source, **options):
    given = [text for key, value in options.items() for text in (f"--{key}", value)]
    assert convert(source, folder, "--to", "zero", *EXACT, *given) == 0
    return manifest.read_manifest(folder / "step00000000")["files"]


def stale_copy(folder, tensor):
    """Put other values of a tensor into a file in which the index does not place it."""
    place = json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    other = next(f for f in sorted(folder.glob("*.safetensors")) if f.name > place)
    weights = load_file(other)
    values = weights[tensor] = torch.full_like(load_weights(folder)[tensor], 7.0)
    save_file(weights, other, {"format": "pt"})
    return values


def test_the_index_decides_between_two_copies(llama, tmp_path):
    expected = written(tmp_path / "expected", llama)
    stale_copy(llama, "model.embed_tokens.weight")
    assert written(tmp_path / "found", llama) == expected


def test_the_index_of_pickles_decides_too(llama, tmp_path):
    expected = written(tmp_path / "expected", llama)
    as_pickle(llama)
    weights = torch.load(llama / "pytorch_model.bin")
    (llama / "pytorch_model.bin").unlink()
    stale = {**weights, NORM: torch.zeros(16)}
    torch.save({NORM: weights.pop(NORM)}, llama / "first.bin")
    torch.save(stale, llama / "second.bin")
    placed = {NORM: "first.bin", **dict.fromkeys(weights, "second.bin")}
    file = llama / "pytorch_model.bin.index.json"
    file.write_text(json.dumps({"weight_map": placed}))
    assert written(tmp_path / "found", llama) == expected


def another_set(folder):
    shutil.copy(next(folder.glob("*.safetensors")), folder / ONE_FILE)


def without_index(folder):
    another_set(folder)
    (folder / INDEX).unlink()


def lead_out(name):
    def change(folder):
        (folder.parent / "other.safetensors").write_bytes(b"")
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][NORM] = name
        (folder / INDEX).write_text(json.dumps(index))

    return change


def repeat_key(name, key):
    def change(folder):
        text = (folder / name).read_text()
        start = text.index(f'"{key}"')
        entry = text[start : text.index("\n", start)].rstrip(",")
        (folder / name).write_text(f"{text[:start]}{entry},\n{text[start:]}")

    return change


def repeat_header_key(folder):
    """As safetensors' own writer never does."""
    file = next(folder.glob("*.safetensors"))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    name = next(key for key in json.loads(header) if key != "__metadata__")
    entry = json.dumps({name: json.loads(header)[name]})[1:-1].encode()
    header = header[:-1] + b"," + entry + b"}"
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


REFUSED = {
    "one file beside several": (another_set, "holds model.safetensors and also model.safetensors."),
    "no index decides": (without_index, "holds model.safetensors and also model-00001-of-"),
    "index leads up": (lead_out("../other.safetensors"), "in '../other.safetensors', which is not"),
    "index is absolute": (lead_out("/etc/passwd"), "in '/etc/passwd', which is not in this"),
    "index repeats a tensor": (repeat_key(INDEX, NORM), f"the key '{NORM}' is given twice"),
    "config repeats a key": (
        repeat_key("config.json", "rms_norm_eps"), "the key 'rms_norm_eps' is given twice"
    ),
    "header repeats a tensor": (repeat_header_key, "is given twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_two_sources_in_a_directory_of_transformers(case, llama, tmp_path, capsys):
    change, message = REFUSED[case]
    change(llama)
    printed = refused(capsys, 2, llama, tmp_path / "out", "--to", "zero")
    assert message in printed
    assert str(llama) in printed
    assert not (tmp_path / "out").exists()
    assert inspect(llama) == 1


def test_old_and_new_names_of_one_tensor(families, tmp_path, capsys):
    bert = shutil.copytree(families["bert"][1], tmp_path / "bert")
    name = "bert.embeddings.LayerNorm.weight"
    old = name.replace("weight", "gamma")
    rewrite(bert, lambda weights: weights.update({old: torch.zeros(16)}))
    assert f"{name} is there twice" in refused(capsys, 2, bert, tmp_path / "out", "--to", "zero")


def test_what_lies_beside_the_weights_is_named(llama, tmp_path, capsys):
    (llama / "adapter_model.safetensors").write_bytes(b"")
    torch.save({}, llama / "pytorch_model.bin")
    (llama / "model-00009-of-00009.safetensors").write_bytes(b"")
    written(tmp_path / "zero", llama)
    printed = capsys.readouterr().out
    assert "adapter_model.safetensors: an adapter, left out" in printed
    assert "pytorch_model.bin: left out, model-00001-of-" in printed
    assert "model-00009-of-00009.safetensors: left out" in printed
    inspect(llama)
    assert "an adapter, left out" in capsys.readouterr().out


@pytest.fixture
def converted(checkpoint, tmp_path):
    def make(form):
        assert convert(checkpoint, tmp_path / form, "--to", form) == 0
        (tag,) = (path for path in (tmp_path / form).iterdir() if path.is_dir())
        return tag

    return make


def change_states(file, change):
    states = torch.load(file, weights_only=False)
    change(states)
    torch.save(states, file)


def uncommitted(tag):
    (tag / manifest.MANIFEST).unlink()
    return tag


def change_metadata(tag, change):
    file = uncommitted(tag) / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


WORDS = "embedding.word_embeddings.weight"


def other_file(metadata):
    place = metadata.storage_data[MetadataIndex(WORDS, torch.Size([0, 0]))]
    place.relative_path = "../" + place.relative_path


def store_numbered_too(metadata):
    for name in list(metadata.state_dict_metadata):
        if name == "decoder.final_layernorm.weight":
            twin = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
            metadata.state_dict_metadata[twin] = metadata.state_dict_metadata[name]
            place = metadata.storage_data[MetadataIndex(name, torch.Size([0]))]
            metadata.storage_data[MetadataIndex(twin, torch.Size([0]))] = place


def store_masters_twice(metadata):
    for name in list(metadata.state_dict_metadata):
        if name.startswith("optimizer.state.param."):
            twin = name.replace("state.param.", "state.fp32_param.")
            metadata.state_dict_metadata[twin] = metadata.state_dict_metadata[name]
            for index, place in list(metadata.storage_data.items()):
                if index.fqn == name:
                    metadata.storage_data[MetadataIndex(twin, index.offset)] = place


DIST = {
    "a file elsewhere": (other_file, "lies in '../__0_"),
    "stacked and numbered": (store_numbered_too, "input_layernorm.weight is stored twice, in "),
    "masters twice": (store_masters_twice, "holds masters twice"),
}


@pytest.mark.parametrize("case", DIST)
def test_two_sources_in_torch_dist(case, converted, tmp_path, capsys):
    change, message = DIST[case]
    tag = converted("megatron")
    change_metadata(tag, change)
    capsys.readouterr()
    assert message in refused(capsys, 2, tag, tmp_path / "out", "--to", "zero")
    assert not (tmp_path / "out").exists()


def list_twice(states):
    first, *others = states["param_shapes"]
    others[0] |= dict([next(iter(first.items()))])


@pytest.mark.parametrize("form", ["zero", "universal"])
def test_a_parameter_in_two_groups(form, converted, tmp_path, capsys):
    tag = uncommitted(converted(form))
    change_states(tag / "mp_rank_00_model_states.pt", list_twice)
    capsys.readouterr()
    printed = refused(capsys, 2, tag, tmp_path / "out", "--to", "zero")
    assert "twice" in printed
    assert str(tag) in printed


def test_model_files_of_two_conversions(converted, tmp_path, capsys):
    tag = uncommitted(converted("universal"))
    own = tag / "mp_rank_00_model_states.pt"
    shutil.copy(own, tag / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    capsys.readouterr()
    assert "of ZeRO-3" in refused(capsys, 2, tag, tmp_path / "out", "--to", "zero")


def test_pointers_name_a_tag_of_their_directory(checkpoint, tmp_path, capsys):
    inner = tmp_path / "inner"
    inner.mkdir()
    shutil.copytree(checkpoint, tmp_path / "step3")
    for pointer in ("latest", "latest_universal", "latest_checkpointed_iteration.txt"):
        file = inner / pointer
        file.write_text("../step3")
        assert f"{file}: expected the name of" in refused(
            capsys, 2, inner, tmp_path / "o", "--to", "hf"
        )
        file.unlink()


def test_a_plan_with_a_key_twice(checkpoint, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    layers = '"source_layers": 2, "target_layers": 3'
    plan.write_text(f'{{"operator": "last", {layers}, "seed": 1, "seed": 2}}')
    assert grow(checkpoint, tmp_path / "out", "--plan", plan) == 2
    error = capsys.readouterr().err
    assert f"{plan}: expected a growth plan" in error
    assert "the key 'seed' is given twice" in error


def change_manifest(tag: Path, change):
    file = tag / manifest.MANIFEST
    file.write_text(change(file.read_text()))


def test_manifests_name_each_file_once_and_within_the_directory(checkpoint, tmp_path):
    tag = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    change_manifest(tag, lambda text: text.replace('"files": {', '"files": {"../x": {"size": 0},'))
    with pytest.raises(CheckpointError, match=r"lists '\.\./x', which is not in this directory"):
        ZeroCheckpoint.open(tag)
    change_manifest(tag, lambda text: text.replace('"../x": {"size": 0},', '"a": {}, "a": {},'))
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: expected .* the key 'a' is given twi"
    ):
        ZeroCheckpoint.open(tag)
