"""Compressed files, tables, and saved datasets as sources of text."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from lag_megatron.config import DataConfig
from lag_megatron.data import open_corpus
from lag_megatron.errors import DataError

pa = pytest.importorskip("pyarrow", reason="the extra data is not installed")

TEXTS = [f"document {number}: größer\n" * (number % 7 + 1) for number in range(500)]


def read(kind: str, *paths: Path, key: str = "text", chunk_bytes: int = 1) -> list[str]:
    config = DataConfig(source=kind, paths=tuple(map(str, paths)), text_key=key)
    return list(open_corpus(config, chunk_bytes=chunk_bytes).texts())


def json_lines() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def test_compressed_lines_are_read_in_any_number_of_frames(tmp_path: Path) -> None:
    data = json_lines()
    half = data.index(b"\n", len(data) // 2) + 1
    parts = (data[:half], data[half:])
    zst = b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in parts)
    (tmp_path / "a.jsonl.zst").write_bytes(zst)
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    (tmp_path / "c.jsonl").write_bytes(data)
    assert read("jsonl", tmp_path) == TEXTS * 3


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_and_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    data = json_lines()
    whole = gzip.compress(data) if name.endswith("gz") else pa.compress(data, "zstd", asbytes=True)
    path = tmp_path / name
    for bad in (whole[:-9], whole + whole[:30], b"no " + whole):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=rf"{name}: damaged or truncated after line \d+"):
            read("jsonl", path)
    data = b'{"text": "a"}\n{"tex": 1}\n'
    whole = gzip.compress(data) if name.endswith("gz") else pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=rf"{name}:2: got no such key"):
        read("jsonl", path)


def write_parquet(path: Path, columns: dict) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=64)


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"n": list(range(500)), "body": TEXTS})
    assert read("parquet", tmp_path, key="body") == TEXTS
    config = DataConfig(source="parquet", paths=(str(tmp_path),), text_key="body")
    one, many = open_corpus(config), open_corpus(config, chunk_bytes=1)
    assert (len(one.chunks), len(many.chunks)) == (1, 8)
    assert one.content_hash == many.content_hash


def test_bad_tables_name_column_and_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": [*TEXTS[:99], None]})
    with pytest.raises(DataError, match=r"a\.parquet: row 100: nothing under 'text'"):
        read("parquet", path)
    with pytest.raises(DataError, match=r"has the columns text. Expected .* named 'body'"):
        read("parquet", path, key="body")
    write_parquet(path, {"text": [1, 2]})
    with pytest.raises(DataError, match=r"the column 'text' holds int64"):
        read("parquet", path)
    broken = pa.array([b"ab\xff"], pa.binary()).view(pa.string())
    write_parquet(path, {"text": broken})
    with pytest.raises(DataError, match=r"a\.parquet: row 1: not UTF-8"):
        read("parquet", path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"cannot be read as Parquet"):
        read("parquet", path)


def save_dataset(folder: Path, *shards: list[str]) -> None:
    """As ``Dataset.save_to_disk`` of Hugging Face's datasets writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=100)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


def test_saved_datasets_are_read_in_their_order(tmp_path: Path) -> None:
    save_dataset(tmp_path / "d" / "train", TEXTS[300:], TEXTS[:300])
    assert read("datasets", tmp_path / "d" / "train") == TEXTS[300:] + TEXTS[:300]
    first = tmp_path / "d" / "train" / "data-00000-of-00002.arrow"
    assert read("datasets", first) == TEXTS[300:]
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"several splits \(train\). Name one, as .*/d/SPLIT"):
        read("datasets", tmp_path / "d")
    first.unlink()
    with pytest.raises(DataError, match=r"lacks data-00000-of-00002\.arrow"):
        read("datasets", tmp_path / "d" / "train")
    with pytest.raises(DataError, match=r"has no state\.json"):
        read("datasets", tmp_path)


def test_an_arrow_file_with_an_index_and_a_truncated_one(tmp_path: Path) -> None:
    path, table = tmp_path / "a.arrow", pa.table({"text": TEXTS})
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=100)
    assert read("datasets", path) == TEXTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.arrow: cannot be read as Arrow"):
        read("datasets", path)


@pytest.mark.parametrize(("kind", "name"), [("parquet", "a.parquet"), ("jsonl", "a.jsonl.zst")])
def test_without_pyarrow_the_command_is_named(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"x")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"needs pyarrow.*pip install 'lag_megatron\[data\]'"):
        read(kind, tmp_path / name)
