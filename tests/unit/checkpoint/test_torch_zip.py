"""Checksums in files of torch.save: what is found, what cannot be, and at what cost."""

import io
import os
import tracemalloc

import pytest
import torch
from zip_records import flip, place_of

from lag_megatron.checkpoint.storage.torch_zip import damaged_records, has_checksums
from lag_megatron.errors import CheckpointError

TENSORS = {"a": torch.arange(1000.0), "b": torch.tensor(3.0)}


@pytest.fixture
def file(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_a_sound_file(file):
    assert list(damaged_records(file)) == []
    assert has_checksums(file)


@pytest.mark.parametrize("record", ["data/0", "data/1", "data.pkl", "version"])
def test_a_flipped_bit_is_named(file, record):
    flip(file, place_of(file, record))
    assert list(damaged_records(file)) == [f"x/{record}"]


def test_all_damaged_records_are_named(file):
    flip(file, place_of(file, "data/0") + 3999)
    flip(file, place_of(file, "data/1"), 128)
    assert list(damaged_records(file)) == ["x/data/0", "x/data/1"]


@pytest.mark.parametrize("unwritten", ["skip_data", "no crc"])
def test_no_checksum_is_no_damage_but_known(tmp_path, unwritten):
    file = tmp_path / "x.pt"
    if unwritten == "skip_data":
        with torch.serialization.skip_data():
            torch.save(TENSORS, file)
    else:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(TENSORS, file)
        finally:
            torch.serialization.set_crc32_options(True)
    assert not has_checksums(file)
    assert list(damaged_records(file)) == []
    flip(file, place_of(file, "data/0"))
    assert list(damaged_records(file)) == []


def test_empty_tensors_need_no_checksum(tmp_path):
    torch.save({"empty": torch.empty(0)}, tmp_path / "x.pt")
    assert has_checksums(tmp_path / "x.pt")


def test_every_flipped_byte_of_every_kind_ends_in_one_way(file):
    """Damage in the archive's own structures is no traceback either."""
    whole = file.read_bytes()
    for position in [*range(700), *range(4500, len(whole))]:
        file.write_bytes(whole)
        flip(file, position, 255)
        try:
            list(damaged_records(file))
        except CheckpointError as error:
            assert "x.pt" in str(error)  # noqa: PT017


@pytest.mark.parametrize("length", [0, 10, 3000, -1])
def test_a_file_cut_short_is_no_zip(file, length):
    os.truncate(file, length if length >= 0 else file.stat().st_size - 1)
    for check in (has_checksums, lambda path: list(damaged_records(path))):
        with pytest.raises(CheckpointError, match=r"x\.pt: no zip archive.*cut short"):
            check(file)


def test_bytes_lost_in_the_middle(file):
    data, start = file.read_bytes(), place_of(file, "data/0")
    file.write_bytes(data[: start + 100] + data[start + 200 :])
    assert "x/data/0" in list(damaged_records(file))


def test_a_missing_file_and_the_old_format(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        has_checksums(tmp_path / "none.pt")
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not has_checksums(tmp_path / "old.pt")
    assert list(damaged_records(tmp_path / "old.pt")) == []
    (tmp_path / "other.pt").write_bytes(b"neither")
    with pytest.raises(CheckpointError, match="no zip archive"):
        has_checksums(tmp_path / "other.pt")


def test_an_archive_inside_a_file(tmp_path):
    parts = []
    for value in (1.0, 2.0):
        buffer = io.BytesIO()
        torch.save(torch.full((50,), value), buffer)
        parts.append(buffer.getvalue())
    file = tmp_path / "two"
    file.write_bytes(b"".join(parts))
    places = [(0, len(parts[0])), (len(parts[0]), len(parts[1]))]
    for offset, length in places:
        assert has_checksums(file, offset=offset, length=length)
        assert list(damaged_records(file, offset=offset, length=length)) == []
    flip(file, file.read_bytes().rindex(b"\x00\x00\x00\x40"))
    found = [list(damaged_records(file, offset=o, length=n)) for o, n in places]
    assert [len(names) for names in found] == [0, 1]
    assert found[1][0].endswith("data/0")
    with pytest.raises(CheckpointError, match="at byte 7"):
        has_checksums(file, offset=7, length=300)


def test_memory_does_not_grow_with_the_file(tmp_path):
    torch.save(torch.zeros(1 << 23), tmp_path / "large.pt")
    tracemalloc.start()
    try:
        assert list(damaged_records(tmp_path / "large.pt")) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
