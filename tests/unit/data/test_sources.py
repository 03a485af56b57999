"""Where text comes from, and how it becomes tokens."""

import json
from pathlib import Path

import pytest

from lag_megatron.config import DataConfig, padded_vocab_size
from lag_megatron.data import Corpus, load_tokenizer, open_corpus, train_bpe
from lag_megatron.data.datasets import tokenizer
from lag_megatron.data.prepare import sources
from lag_megatron.errors import DataError

TEXT = "def add(a, b):\n    return a + b  # größer\n\n\nclass Sum:\r\n\tpass\n" * 20


def text_of(found: Corpus) -> list[str]:
    return list(found.texts())


def test_text_takes_files_globs_and_folders_each_once_in_order(tmp_path: Path) -> None:
    deep = tmp_path / "folder" / "deep"
    deep.mkdir(parents=True)
    for name, text in (("b.txt", "b"), ("a.txt", "a"), ("note.md", "m"), ("deep/c.txt", "c")):
        (tmp_path / "folder" / name).write_text(text)
    paths = (str(tmp_path / "folder/note.md"), str(tmp_path / "folder/?.txt"))
    assert text_of(open_corpus(DataConfig(source="text", paths=paths))) == ["m", "a", "b"]
    paths = (str(tmp_path / "folder/b.txt"), str(tmp_path / "folder"))
    assert text_of(open_corpus(DataConfig(source="text", paths=paths))) == ["b", "a", "c"]


def test_hash_knows_text_and_order_but_not_names(tmp_path: Path) -> None:
    def digest(**files: str) -> str:
        folder = tmp_path / "_".join(files)
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.txt").write_text(text)
        return open_corpus(DataConfig(source="text", paths=(str(folder),))).content_hash

    assert digest(a="one", b="two") == digest(c="one", d="two")
    assert digest(e="two", f="one") != digest(g="one", h="two")
    assert digest(i="on", j="etwo") != digest(k="one", l="two")


def test_empty_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("é")
    found = open_corpus(DataConfig(source="text", paths=(str(tmp_path),)))
    assert (len(found), found.skipped_files, found.bytes) == (1, 1, 2)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("missing.txt",), "'missing.txt' is no such file"),
        (("no*.txt",), "'no\\*.txt' is no such file"),
        ((".",), "folder without \\*.txt files"),
    ],
)
def test_paths_that_name_nothing(
    paths: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_corpus(DataConfig(source="text", paths=paths))


def test_text_must_be_utf8_and_there(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    config = DataConfig(source="text", paths=(str(bad),))
    bad.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 \(byte 2 is 0xff\)"):
        open_corpus(config)
    bad.write_bytes(b"")
    with pytest.raises(DataError, match="no text found"):
        open_corpus(config)
    bad.write_bytes(b"text")
    found = open_corpus(config)
    bad.unlink()
    with pytest.raises(DataError, match=r"bad\.txt: cannot read the file"):
        text_of(found)


def test_jsonl_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "eins\\nzwei"}\n\n{"body": ""}\n{"body": "größer", "x": 1}')
    found = open_corpus(DataConfig(source="jsonl", paths=(str(tmp_path),), text_key="body"))
    assert text_of(found) == ["eins\nzwei", "größer"]
    assert found.skipped_files == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object .* cannot be read as JSON"),
        ("[1]", "expected a JSON object .* it holds a list"),
        ('{"other": "x"}', "got no such key"),
        ('{"text": 5}', "got int under 'text'"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        open_corpus(DataConfig(source="jsonl", paths=(str(path),)))


def test_stdlib_leaves_out_packages_and_what_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"no \.py files"):
        open_corpus(DataConfig())
    for folder in ("site-packages", "dist-packages", "json/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text("left out")
    (tmp_path / "b.py").write_text("b")
    (tmp_path / "json" / "a.py").write_text("a")
    (tmp_path / "data.txt").write_text("left out")
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    found = open_corpus(DataConfig())
    assert text_of(found) == ["b", "a"]
    assert found.skipped_files == 1


def test_the_real_stdlib_is_a_corpus() -> None:
    found = open_corpus(DataConfig())
    assert found.bytes > 5e6
    assert len(found) > 300


def test_bpe_round_trip_is_exact_and_training_deterministic() -> None:
    bpe = train_bpe([TEXT], vocab_size=280)
    again = train_bpe([TEXT], vocab_size=280)
    assert bpe.digest == again.digest
    assert bpe.vocab_size == 280
    unseen = "漢字 <|endoftext|> \x00\t 🙂"
    first, second = bpe.encode_documents([unseen, ""])
    assert first.tolist().count(bpe.eod) == 1
    assert first[-1] == bpe.eod
    assert bpe.decode(first[:-1].tolist()) == unseen
    assert second.tolist() == [bpe.eod]


def test_long_texts_are_cut_after_lines_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_PIECE_CHARACTERS", 50)
    monkeypatch.setattr(tokenizer, "_BATCH_CHARACTERS", 120)
    bpe = train_bpe([TEXT], vocab_size=300)
    texts = [TEXT, "short", "x" * 333, TEXT[:50]]
    encoded = list(bpe.encode_documents(texts))
    assert [bpe.decode(ids[:-1].tolist()) for ids in encoded] == texts


def test_a_tokenizer_file_is_read_back(tmp_path: Path) -> None:
    bpe = train_bpe([TEXT], vocab_size=300)
    bpe.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.eod, loaded.vocab_size, loaded.digest) == (bpe.eod, bpe.vocab_size, bpe.digest)
    assert loaded.pad not in range(loaded.vocab_size)


def test_tokenizer_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(
        DataError, match=r"tokenizer\.json: expected a tokenizer\.json .*no such file"
    ):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(path)
    train_bpe([TEXT], vocab_size=300).save(path)
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree).replace("<|endoftext|>", "<other>"))
    with pytest.raises(DataError, match=r"no end-of-document token. Expected one of <\|endoft"):
        load_tokenizer(path)
    path.write_text(json.dumps(tree).replace("<|endoftext|>", "</s>"))
    assert load_tokenizer(path).eod == 0


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (128, 128), (129, 256), (4096, 4096)])
def test_padded_vocab_size(size: int, padded: int) -> None:
    assert padded_vocab_size(size) == padded


def test_documents_of_a_long_text_do_not_depend_on_the_chunks(tmp_path: Path) -> None:
    lines = [f"line {number} of a long file\n" for number in range(20_000)]
    path = tmp_path / "long.txt"
    path.write_text("".join(lines))
    config = DataConfig(source="text", paths=(str(path),))
    corpus, other = open_corpus(config), open_corpus(config, chunk_bytes=1)
    texts = text_of(corpus)
    assert len(corpus) > 5
    assert "".join(texts) == path.read_text()
    assert all(text.endswith("\n") and len(text) < 70_000 for text in texts)
    assert (len(corpus.chunks), len(other.chunks)) == (1, len(corpus))
    assert text_of(other) == texts
    assert other.content_hash == corpus.content_hash


def test_a_bad_line_far_inside_a_cut_file_has_its_number(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path = tmp_path / "a.jsonl"
    path.write_text(line * 400 + "{\n" + line * 9)
    for size in (1, 10**9):
        with pytest.raises(DataError, match=r"a\.jsonl:401: .*cannot be read as JSON"):
            open_corpus(DataConfig(source="jsonl", paths=(str(path),)), chunk_bytes=size)
    path = tmp_path / "b.txt"
    path.write_bytes(b"fine\n" * 80_000 + b"\xff\n")
    with pytest.raises(DataError, match=r"b\.txt:\d+: not UTF-8"):
        open_corpus(DataConfig(source="text", paths=(str(path),)), chunk_bytes=1)
