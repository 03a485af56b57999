"""Damage that conversions find: in what they read, and with --verify in what they wrote."""

import json
import os
import shutil

import pytest
from converting import convert, copy_llama, refused, save_families

from lag_megatron.checkpoint.open import open_checkpoint, resolve_checkpoint
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import VerifyScope
from lag_megatron.errors import CheckpointError

families = pytest.fixture(save_families, scope="module")
folder = pytest.fixture(copy_llama)


def test_files_that_are_cut_short(folder, tmp_path, capsys):
    file = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 4)
    assert "cut short" in refused(capsys, 2, folder, tmp_path / "out", "--to", "zero")


@pytest.mark.parametrize("form", ["zero", "universal", "megatron", "hf"])
def test_verify_finds_one_bit(form, families, tmp_path, capsys):
    _, source = families["gpt2"]
    assert convert(source, tmp_path / "out", "--to", form, "--verify") == 0
    target = max((p for p in (tmp_path / "out").rglob("*") if holds_values(p)), key=size_of)
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    capsys.readouterr()
    assert convert(source, tmp_path / "out", "--to", form, "--verify") == 1
    messages = capsys.readouterr().out
    assert f"{target.name}: content differs from its checksum" in messages
    assert "elements differ" in messages


def holds_values(path):
    if path.suffix == ".distcp":  # numbered by what it holds: weights, masters, moments
        return path.stem.split("_")[-1].isdigit() and int(path.stem.split("_")[-1]) % 4 == 1
    return path.suffix in (".pt", ".safetensors") and not path.name.startswith("mp_rank")


def size_of(path):
    return path.stat().st_size


def test_damage_in_the_source_leaves_nothing(checkpoint, tmp_path, capsys):
    source = shutil.copytree(checkpoint, tmp_path / "step3")
    file = source / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    error = refused(capsys, 2, source, tmp_path / "out", "--to", "megatron")
    assert "damaged: zero_pp_rank_1_mp_rank_00_optim_states.pt: content differs" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_a_changed_export_is_seen(families, tmp_path, capsys):
    assert convert(families["gpt2"][1], tmp_path / "hf", "--to", "hf") == 0
    file = max((tmp_path / "hf").glob("*.safetensors"), key=size_of)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    error = refused(capsys, 2, tmp_path / "hf", tmp_path / "out", "--to", "zero")
    assert "content differs from its checksum" in error


def flip(file, at):
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))


@pytest.fixture
def resharded(checkpoint, tmp_path):
    """A checkpoint on three ranks, whose manifest tells the states of each file apart."""
    assert convert(checkpoint, tmp_path / "own", "--to", "zero", "--world-size", 3) == 0
    return tmp_path / "own" / "step3"


def test_an_export_compares_what_it_reads_and_no_more(resharded, tmp_path, capsys):
    name = "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    file = resharded / name
    apart = manifest.read_manifest(resharded)["files"][name][manifest.STATES_APART]
    begin, end = apart["exp_avg"]["runs"][0]
    flip(file, (begin + end) // 2)
    assert convert(resharded, tmp_path / "hf", "--to", "hf") == 0
    error = refused(capsys, 2, resharded, tmp_path / "other", "--to", "universal")
    assert f"damaged: {name}: content differs" in error
    masters = sum(apart["fp32"]["runs"][0]) // 2
    archive = apart[manifest.NO_STATE]["runs"][-1][1] - 1  # its end: offsets and a comment
    for state, at in (("fp32", masters), (manifest.NO_STATE, archive)):
        flip(file, at)
        error = refused(capsys, 2, resharded, tmp_path / "again", "--to", "hf")
        assert name in error
        assert state != "fp32" or f"{name}: fp32: content differs from its checksum" in error
        assert list(tmp_path.glob("again/*")) == []
        flip(file, at)


@pytest.mark.parametrize("known", [{}, 5, "no masters", "no file"])
def test_a_manifest_that_does_not_cover_what_is_read(known, resharded, tmp_path, capsys):
    name = "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    found = manifest.read_manifest(resharded)
    entry = found["files"][name]
    masters = sum(entry[manifest.STATES_APART]["fp32"]["runs"][0]) // 2
    if known == "no file":
        del found["files"][name]
    elif known == "no masters":
        del entry[manifest.STATES_APART]["fp32"]
    else:
        entry[manifest.STATES_APART] = known
    (resharded / "manifest.json").write_text(json.dumps(found))
    if known != "no file":
        assert convert(resharded, tmp_path / "hf", "--to", "hf") == 0
    flip(resharded / name, masters)
    error = refused(capsys, 2, resharded, tmp_path / "again", "--to", "hf")
    assert name in error


@pytest.mark.parametrize("form", ["zero", "universal", "megatron", "hf"])
def test_ranks_share_the_looking(form, checkpoint, tmp_path):
    """Of three ranks one finds a damage; together they look at every file."""
    assert convert(checkpoint, tmp_path / "out", "--to", form, "--world-size", 2) == 0
    tag = resolve_checkpoint(tmp_path / "out")
    for name in sorted(manifest.read_manifest(tag)["files"]):
        if (tag / name).suffix not in (".pt", ".distcp", ".safetensors"):
            continue
        source, messages = open_checkpoint(tag), []
        flip(tag / name, (tag / name).stat().st_size // 2)
        for rank in range(3):
            try:
                source.require_sound(VerifyScope(rank, 3))
            except CheckpointError as error:
                messages.append(str(error))
        flip(tag / name, (tag / name).stat().st_size // 2)
        assert len(messages) == 1, name
        assert name in messages[0]
