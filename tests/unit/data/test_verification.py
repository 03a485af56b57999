"""Stored checksums are compared: what before training, what beside it, what is remembered."""

import dataclasses
import json
import os
import time
from functools import partial

import numpy as np
import pytest

from lag_megatron.config import DataConfig, TokenizerConfig
from lag_megatron.data import DataVerification, PreparedData, prepare_data
from lag_megatron.data.datasets import checksums, verification
from lag_megatron.data.datasets.checksums import BLOCKS, block_table, checksum
from lag_megatron.data.datasets.indexed_dataset import open_documents
from lag_megatron.data.prepare import build
from lag_megatron.errors import DataError

BLOCK = 4096


@pytest.fixture
def data(corpus, tmp_path, monkeypatch):
    """Prepared data whose training tokens are large, in blocks of 4 KiB."""
    monkeypatch.setattr(verification, "SMALL_BYTES", 1000)
    monkeypatch.setattr(build, "block_table", partial(block_table, block_bytes=BLOCK))
    config = DataConfig(
        source="text",
        paths=(str(corpus),),
        tokenizer=TokenizerConfig(type="bpe", vocab_size=300),
        validation_fraction=0.1,
    )
    prepared = prepare_data(config, cache_dir=tmp_path / "prepared")
    for path in prepared.folder.iterdir():
        os.utime(path, ns=(time.time_ns(), time.time_ns() - 10_000_000_000))
    assert prepared.files["train.bin"][0] > 8 * BLOCK
    return prepared


def verify(data, folder, *, everything=False, rank=0, size=1):
    return DataVerification(
        data, everything=everything, rank=rank, size=size, cache=folder / "verified"
    )


def overwrite(path, first, old_times=False):
    """Write other tokens of the vocabulary at a byte, in place."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(first)
        there = np.frombuffer(file.read(20), dtype=np.uint16)
        file.seek(first)
        file.write(np.where(there == 7, 8, 7).astype(np.uint16).tobytes())
    if old_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def finished(check):
    """The reasons that the process beside gives to stop, when it has compared its share."""
    reasons = []
    check.compare_later(reasons.append)
    if check._follower is not None:
        check._follower.join(60)
        assert not check._follower.is_alive()
    return reasons


@pytest.mark.parametrize("name", ["train.idx", "validation.bin", "tokenizer.json", BLOCKS])
def test_all_but_the_training_tokens_are_compared_at_the_start(name, data, tmp_path):
    path = data.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        verify(data, tmp_path).compare_first()
    expected = data.files[name][1]
    assert f"{path}: its bytes are not those that were written" in str(caught.value)
    assert f"xxh3 {checksum(path)}, expected {expected}" in str(caught.value)


@pytest.mark.parametrize("everything", [False, True])
def test_small_training_tokens_and_on_demand_all(everything, data, tmp_path, monkeypatch):
    if not everything:
        monkeypatch.setattr(verification, "SMALL_BYTES", 1 << 28)
    verify(data, tmp_path, everything=everything).compare_first()
    overwrite(data.folder / "train.bin", 3 * BLOCK)
    with pytest.raises(DataError, match=r"train\.bin: .*its bytes are not those"):
        verify(data, tmp_path, everything=everything).compare_first()


def test_the_blocks_that_are_not_sampled_are_compared_beside(data, tmp_path):
    overwrite(data.folder / "train.bin", 3 * BLOCK + 100)
    check = verify(data, tmp_path)
    check.compare_first()
    check.require_sound()
    assert check.compared < check.total
    assert finished(check) == ["prepared data was changed"]
    with pytest.raises(DataError, match=r"train.bin: bytes 12,288 to 16,384: its bytes .*expected"):
        check.require_sound()


def test_ranks_share_the_work(data, tmp_path):
    checks = [verify(data, tmp_path, rank=rank, size=3) for rank in range(3)]
    for check in checks:
        check.compare_first()
        assert finished(check) == []
    assert sum(check.compared for check in checks) == checks[0].total
    assert max(check.compared for check in checks) < checks[0].total


def test_what_was_good_is_not_read_again(data, tmp_path, monkeypatch):
    check = verify(data, tmp_path)
    check.compare_first()
    finished(check)
    read = []
    monkeypatch.setattr(verification, "range_checksum", lambda path, **_: read.append(path.name))
    again = verify(data, tmp_path)
    again.compare_first()
    again.compare_later(print)
    assert (read, again._process, again.compared) == ([], None, again.total)
    monkeypatch.undo()
    monkeypatch.setattr(verification, "SMALL_BYTES", 1000)
    overwrite(data.folder / "train.bin", 0)  # which changes the file's time
    with pytest.raises(DataError, match=r"train\.bin: bytes 0 to 4,096"):
        verify(data, tmp_path).compare_first()


def test_a_file_that_was_just_changed_is_not_remembered(data, tmp_path):
    path = data.folder / "validation.bin"
    os.utime(path)
    verify(data, tmp_path).compare_first()
    overwrite(path, 0, old_times=True)
    with pytest.raises(DataError, match=r"validation\.bin"):
        verify(data, tmp_path).compare_first()


def test_a_folder_prepared_before_there_were_blocks(data, tmp_path):
    files = {name: entry for name, entry in data.files.items() if name != BLOCKS}
    (data.folder / BLOCKS).unlink()
    dataclasses.replace(data, files=files).write_meta()
    old = PreparedData.open(data.folder)
    check = verify(old, tmp_path)
    check.compare_first()
    assert check.uncompared == [data.folder / "train.bin"]
    assert verify(old, tmp_path, everything=True).uncompared == []
    overwrite(data.folder / "train.bin", 3 * BLOCK)
    with pytest.raises(DataError, match=r"train\.bin"):
        verify(old, tmp_path, everything=True).compare_first()


def test_a_table_of_other_lengths_is_refused(data):
    table = json.loads(block_table(data.folder / "train.bin", block_bytes=BLOCK))
    path = data.folder / BLOCKS
    path.write_text(json.dumps({**table, "checksums": table["checksums"][1:]}))
    with pytest.raises(DataError, match="table of checksums"):
        checksums.read_block_table(path, expected=checksum(path), size=data.files["train.bin"][0])


@pytest.mark.parametrize("damage", ["cut", "magic", "pointer", "bin"])
def test_a_damaged_index_names_the_file(damage, data):
    path = data.folder / ("train.bin" if damage == "bin" else "train.idx")
    content = bytearray(path.read_bytes())
    if damage in ("cut", "bin"):
        del content[len(content) // 2 :]
    elif damage == "magic":
        content[0] ^= 1
    else:
        content[34:38] = b"\xff\xff\xff\x7f"  # the first length: magic, version, type and counts
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.idx: cannot be read as Megatron's index"):
        open_documents(data.train_prefix)
