"""The inspection tool on other programs' checkpoints, damaged and malicious."""

import functools
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from foreign_checkpoints import NORM, UNVERIFIED, look_at, made_in
from programs import inspect
from zip_records import flip, place_of

from lag_megatron.checkpoint.hf import format as hf_format
from lag_megatron.checkpoint.megatron import dcp_metadata, dist_checkpoint
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import CheckpointError

# Torch says so of every save by a single process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return functools.partial(made_in, tmp_path_factory.getbasetemp())


@pytest.fixture
def copied(made, tmp_path):
    return lambda name: shutil.copytree(made(name), tmp_path / made(name).name)


@pytest.fixture
def look(capsys):
    return functools.partial(look_at, capsys=capsys)


def cut(file):
    os.truncate(file, file.stat().st_size - 200)


def spoil(file):
    file.write_bytes(b"[" + file.read_bytes()[1:])


def zarr(file):
    file.write_text('{"sharded_backend": "zarr"}')


def shrink(file):
    torch.save({"cat_dim": 0, "param": torch.zeros(3)}, file)


def lose_a_chunk(file):
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    file.write_bytes(pickle.dumps(metadata))


def lose_a_place(file):
    metadata = pickle.loads(file.read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == "embedding.word_embeddings.weight")
    del metadata.storage_data[index]
    file.write_bytes(pickle.dumps(metadata))


def name_a_missing_shard(file):
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00009-of-00009.safetensors"
    file.write_text(json.dumps(index))


def more_layers(file):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 5}))


SHARD, BIN, INDEX = "model-00002-of-*.safetensors", "pytorch_model.bin", hf_format.INDEX
DAMAGE = [
    ("universal", f"{NORM}/exp_avg.pt", Path.unlink, f"{NORM}/exp_avg.pt: missing"),
    ("universal", f"{NORM}/step.pt", Path.unlink, f"{NORM}/step.pt: missing"),
    ("universal", f"{NORM}/fp32.pt", cut, f"{NORM}/fp32.pt: damaged or cut short"),
    ("universal", NORM, shutil.rmtree, f"{NORM}: missing"),
    ("universal", f"{NORM}/exp_avg.pt", shrink, f"{NORM}: its states differ in their numbers"),
    ("universal", "zero/optimizer_state.pt", Path.unlink, "zero/optimizer_state.pt: this file"),
    ("universal", "mp_rank_00_model_states.pt", Path.unlink, "conversion copies last"),
    ("universal", "mp_rank_00_model_states.pt", cut, "mp_rank_00_model_states.pt: damaged or cut"),
    ("universal3", f"{NORM}/exp_avg_sq.pt", Path.unlink, f"{NORM}/exp_avg_sq.pt: missing"),
    ("universal3", "zero_pp_rank_1_*", Path.unlink, "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ("stacked", "metadata.json", Path.unlink, "metadata.json: missing. It is written last"),
    ("stacked", "metadata.json", spoil, "metadata.json: expected the settings"),
    ("stacked", "metadata.json", zarr, "metadata.json: sharded_backend 'zarr'"),
    ("stacked", ".metadata", Path.unlink, ".metadata: missing. It is written last"),
    ("stacked", ".metadata", cut, ".metadata: damaged or cut short"),
    ("stacked", ".metadata", lose_a_chunk, "fc2.weight: its pieces hold 768 of 1024 elements"),
    ("stacked", ".metadata", lose_a_place, "word_embeddings.weight: does not say where its data"),
    ("stacked", "common.pt", Path.unlink, "common.pt: missing"),
    ("stacked", "common.pt", cut, "common.pt: damaged or cut short"),
    ("stacked", "__1_0.distcp", Path.unlink, "__1_0.distcp: missing"),
    ("numbered", "__1_0.distcp", cut, "__1_0.distcp: cut short"),
    ("plain", ".metadata", Path.unlink, ".metadata: missing"),
    ("plain", "__0_0.distcp", cut, "__0_0.distcp: cut short"),
    ("llama", SHARD, Path.unlink, ".safetensors: missing"),
    ("llama", SHARD, cut, ".safetensors: cut short"),
    ("llama", SHARD, lambda file: os.truncate(file, 100), ".safetensors: damaged or cut short"),
    ("llama", INDEX, name_a_missing_shard, "model-00009-of-00009.safetensors: missing"),
    ("llama", INDEX, Path.unlink, f"{INDEX}: missing, but model-00001-of-"),
    ("llama", INDEX, cut, f"{INDEX}: expected the index"),
    ("llama", "config.json", Path.unlink, "config.json: missing"),
    ("llama", "config.json", more_layers, "config.json: says 5 layers, but the weights are of 2"),
    ("gpt2", "model.safetensors", Path.unlink, "no weights: neither model.safetensors"),
    ("gpt2", "config.json", spoil, "config.json: expected settings"),
    ("pickled", BIN, cut, "pytorch_model.bin: no zip archive"),
]


@pytest.mark.parametrize(("name", "file", "damage", "message"), DAMAGE)
def test_damage_is_not_sound(name, file, damage, message, copied, capsys):
    path = copied(name)
    damage(next(path.glob(file)))
    capsys.readouterr()  # what making the checkpoint printed
    assert inspect(path) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert inspect(path, "--verify") == 1
    assert UNVERIFIED in capsys.readouterr().err


def place_in(path, file, tmp_path):
    """Where the values of some tensor in a data file of a Distributed Checkpoint begin."""
    contents = dcp_metadata.read_metadata(path)
    name, place = next(
        (name, place)
        for name, tensor in contents.tensors.items()
        for _, place in tensor.chunks
        if place.file == file.name
    )
    blob = tmp_path / "blob"
    blob.write_bytes(file.read_bytes()[place.offset : place.offset + place.length])
    return name, place.offset + place_of(blob, "data/0")


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("universal", f"{NORM}/fp32.pt", f"{NORM}/fp32.pt: fp32/data/0 differs"),
        ("stacked", "common.pt", "common.pt: common/data.pkl differs"),
        ("stacked", "__1_0.distcp", "__1_0.distcp: the content of {} differs"),
        ("plain", "__0_0.distcp", "__0_0.distcp: the content of {} differs"),
        ("pickled", BIN, f"{BIN}: pytorch_model/data/0 differs"),
        ("llama", SHARD, None),  # safetensors keeps no checksums
    ],
)
def test_flipped_bits_are_found_where_there_are_checksums(
    name, file, message, copied, tmp_path, look, capsys
):
    path = copied(name)
    found = next(path.glob(file))
    tensor = None
    if found.suffix == ".distcp":
        tensor, position = place_in(path, found, tmp_path)
    elif found.suffix == ".safetensors":
        position = found.stat().st_size - 1
    else:
        position = place_of(found, "data.pkl" if found.name == dist_checkpoint.COMMON else "data/0")
        position += 2 if found.name == dist_checkpoint.COMMON else 0
    flip(found, position, 1)
    sound = inspect(path) == 0
    capsys.readouterr()
    assert (
        sound or found.name == dist_checkpoint.COMMON
    )  # whose pickle may not be readable any more
    problems = look(path, "--verify")["problems"]
    assert problems[-1] == UNVERIFIED
    assert any(message.format(tensor) in p for p in problems) if message else len(problems) == 1


def test_flipped_bits_in_a_zero_checkpoint_without_a_manifest(checkpoint, tmp_path, look):
    path = shutil.copytree(checkpoint, tmp_path / "step3")
    (path / manifest.MANIFEST).unlink()
    file = path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    flip(file, place_of(file, "data/0"))
    assert look(path)["problems"] == []
    damage, unverified = look(path, "--verify")["problems"]
    assert damage.startswith(f"{file.name}: ")
    assert damage.endswith("/data/0 differs from its checksum")
    assert unverified == UNVERIFIED


def test_a_manifest_speaks_for_other_formats_too(copied, tmp_path, look):
    path = copied("gpt2")
    files = {p.name: manifest.file_entry(p) for p in path.iterdir()}
    path.rename(manifest.temporary(path))
    manifest.commit(path, files=files, metadata={})
    assert look(path, "--verify")["sound"] is True
    flip(path / "model.safetensors", -1)
    assert look(path, "--verify")["problems"] == [
        "model.safetensors: content differs from its checksum"
    ]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("name", "file", "code", "message"),
    [
        ("stacked", ".metadata", 1, ".metadata: holds posix.mkdir"),
        ("plain", ".metadata", 1, ".metadata: holds posix.mkdir"),
        ("universal", f"{NORM}/exp_avg.pt", 1, "exp_avg.pt: holds objects that no DeepSpeed"),
        ("universal", "mp_rank_00_model_states.pt", 1, "states.pt: holds objects that no"),
        ("stacked", "common.pt", 0, "common.pt: left unread, because it holds posix.mkdir"),
        ("pickled", BIN, 0, f"{BIN}: holds the weights as a pickle, not opened"),
    ],
)
def test_nothing_in_a_checkpoint_is_run(name, file, code, message, copied, tmp_path, capsys):
    path, trace = copied(name), tmp_path / "ran"
    if file == ".metadata":
        (path / file).write_bytes(pickle.dumps({"state_dict_metadata": Evil(trace)}))
    else:
        torch.save({"iteration": 3, "other": Evil(trace)}, path / file)
    assert inspect(path) == code
    printed = capsys.readouterr()
    assert message in (printed.err if code else printed.out)
    assert printed.err.count("\n") == code
    assert inspect(path, "--verify") == 1
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch.Tensor", "collections.OrderedDict"]
)
def test_metadata_may_name_nothing_else(name, tmp_path):
    module, _, attribute = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(CheckpointError, match=rf"holds {name}, which no checkpoint's metadata has"):
        dcp_metadata.read_metadata(tmp_path)


def test_any_damage_to_metadata_is_one_message(made, tmp_path):
    data = (made("plain") / ".metadata").read_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 255
        (tmp_path / ".metadata").write_bytes(changed)
        try:
            list(dcp_metadata.problems(dcp_metadata.read_metadata(tmp_path)))
        except CheckpointError as error:
            assert ".metadata" in str(error)  # noqa: PT017
