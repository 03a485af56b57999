"""From text to prepared files, and from those to batches by step."""

import contextlib
import errno
import json
import logging
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from lag_megatron.config import DataConfig, TokenizerConfig
from lag_megatron.data import PreparedData, TrainingData, ValidationData, open_corpus, prepare_data
from lag_megatron.data.prepare import build, tokenize
from lag_megatron.errors import DataError

DOCUMENTS = 40
SEQ_LENGTH = 16
GLOBAL_BATCH = 6


def texts() -> list[str]:
    draw = random.Random(0)
    words = ["für", "if", "else", "return", "x1", "=", "\n", "  ", "(", ")", "import", "漢字"]
    return [
        f"{number}: " + " ".join(draw.choices(words, k=draw.randint(1, 120)))
        for number in range(DOCUMENTS)
    ]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return DataConfig(
        source="jsonl",
        paths=(str(path),),
        tokenizer=TokenizerConfig(vocab_size=320),
        validation_fraction=0.2,
    )


@pytest.fixture(scope="module")
def prepared(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare_data(config, cache_dir=tmp_path_factory.mktemp("cache") / "data")


def training(
    prepared: PreparedData, *, seed: int = 7, global_batch: int = GLOBAL_BATCH
) -> TrainingData:
    return TrainingData(prepared, seq_length=SEQ_LENGTH, global_batch=global_batch, seed=seed)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def documents_of(prepared: PreparedData, prefix: str) -> list[str]:
    tokenizer = prepared.tokenizer()
    documents = IndexedDataset(prefix)
    assert all(documents[i][-1] == tokenizer.eod for i in range(len(documents)))
    return [tokenizer.decode(documents[i][:-1].tolist()) for i in range(len(documents))]


def test_every_text_comes_back_from_exactly_one_split(prepared: PreparedData) -> None:
    train = documents_of(prepared, prepared.train_prefix)
    validation = documents_of(prepared, prepared.validation_prefix)
    assert sorted(train + validation) == sorted(texts())
    assert (len(train), len(validation)) == (32, 8)
    assert (prepared.train_documents, prepared.validation_documents) == (32, 8)
    assert IndexedDataset(prepared.train_prefix).index.dtype == np.uint16


def test_meta_describes_the_tokens(prepared: PreparedData) -> None:
    def counts(prefix: str) -> Counter[int]:
        documents = IndexedDataset(prefix)
        return Counter(int(t) for i in range(len(documents)) for t in documents[i])

    train, validation = counts(prepared.train_prefix), counts(prepared.validation_prefix)
    assert prepared.train_tokens == train.total()
    assert prepared.validation_tokens == validation.total()
    total = train.total() + prepared.vocab_size
    nats = sum(-n * math.log((train[t] + 1) / total) for t, n in validation.items())
    assert prepared.unigram_entropy == pytest.approx(nats / validation.total())
    assert prepared.bytes == sum(len(text.encode()) for text in texts())


def test_the_second_call_builds_nothing(
    config: DataConfig, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "encode_corpus", None)
    assert prepare_data(config, cache_dir=prepared.folder.parent) == prepared
    assert PreparedData.open(prepared.folder) == prepared


@pytest.mark.parametrize("change", [{"seed": 5}, {"validation_fraction": 0.3}, {"tokenizer": None}])
def test_what_shapes_the_files_names_the_folder(
    change: dict, config: DataConfig, prepared: PreparedData
) -> None:
    if "tokenizer" in change:
        path = str(prepared.tokenizer_path)
        change = {"tokenizer": TokenizerConfig(type="file", path=path)}
    values = {key: getattr(config, key) for key in ("source", "paths", "tokenizer")}
    other = DataConfig(**{**values, "validation_fraction": 0.2, **change})
    made = prepare_data(other, cache_dir=prepared.folder.parent)
    assert made.folder != prepared.folder
    assert made.vocab_size == prepared.vocab_size


def test_half_written_and_foreign_folders_are_refused(
    config: DataConfig, prepared: PreparedData, tmp_path: Path
) -> None:
    taken = tmp_path / prepared.folder.name
    taken.mkdir()
    (taken / "train.bin").write_bytes(b"\1\2")
    with pytest.raises(DataError, match=r"holds files, but no complete prepared data"):
        prepare_data(config, cache_dir=tmp_path)
    begun = tmp_path / "mine.part"
    begun.mkdir()
    (begun / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"mine\.part: holds files that are not prepared data"):
        prepare_data(config, cache_dir=tmp_path, output=tmp_path / "mine")
    (begun / "notes.txt").unlink()
    (begun / "draft.json").write_text('{"digest": "of other text"}')
    with pytest.raises(DataError, match=r"half-written, from other text or settings"):
        prepare_data(config, cache_dir=tmp_path, output=tmp_path / "mine")
    other = DataConfig(source="jsonl", paths=config.paths, tokenizer=config.tokenizer)
    with pytest.raises(DataError, match=r"holds other prepared data"):
        prepare_data(other, cache_dir=tmp_path, output=prepared.folder)


def test_damage_is_found(config: DataConfig, tmp_path: Path) -> None:
    made = prepare_data(config, cache_dir=tmp_path)
    made.verify()
    path = Path(made.train_prefix + ".bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train\.bin: its bytes are not those that were written"):
        PreparedData.open(made.folder).verify()
    path.write_bytes(data[:-2])
    for act in (lambda: PreparedData.open(made.folder), lambda: prepare_data(
        config, cache_dir=tmp_path)):  # fmt: skip
        with pytest.raises(DataError, match=rf"has {len(data) - 2} bytes, expected {len(data)}"):
            act()
    path.unlink()
    with pytest.raises(DataError, match=r"train\.bin: is missing"):
        PreparedData.open(made.folder)


def test_losing_the_race_to_another_process_is_fine(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exclusive = build.staging_dir.exclusive

    @contextlib.contextmanager
    def late(folder: Path, *, digest: str) -> Iterator[Path]:
        with monkeypatch.context() as first:
            first.setattr(build.staging_dir, "exclusive", exclusive)
            prepare_data(config, cache_dir=tmp_path)  # the other one, while we wait for the lock
        with exclusive(folder, digest=digest):
            yield folder

    monkeypatch.setattr(build.staging_dir, "exclusive", late)
    made = prepare_data(config, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [made.folder.name]


def test_a_disk_that_is_too_small_is_told_beforehand(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(build, "encode_corpus", None)
    with pytest.raises(DataError, match=r"no room for the prepared data: about .* are needed"):
        prepare_data(config, cache_dir=tmp_path)


def test_text_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    found = open_corpus(DataConfig(source="text", paths=(str(tmp_path),)))
    for change in ("c", "", "b\nc"):
        (tmp_path / "b.txt").write_text(change)
        with pytest.raises(DataError, match=r"a\.txt to .*b\.txt: changed while"):
            list(found.texts())


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "no room left"), (errno.EACCES, "cannot write")]
)
def test_a_disk_that_refuses(
    code: int, message: str, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, "refused")

    with monkeypatch.context() as full:
        full.setattr(tokenize.IndexedDatasetBuilder, "add_document", refuse)
        with pytest.raises(DataError, match=message):
            prepare_data(config, cache_dir=tmp_path)
    made = prepare_data(config, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == [made.folder]


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alone")
    config = DataConfig(source="text", paths=(str(tmp_path),))
    with pytest.raises(DataError, match=r"leaves none to train on. Expected at least 2 documents"):
        prepare_data(config, cache_dir=tmp_path / "cache")


def test_a_host_that_does_not_see_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"this host does not see .* that all hosts share"):
        PreparedData.open(tmp_path / "nowhere")
    for text in ("{", "[]", '{"a": 1}'):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(DataError, match=r"meta\.json: (expected the|cannot be read)"):
            PreparedData.open(tmp_path)


def test_a_batch_has_the_shapes_and_shifted_labels(prepared: PreparedData) -> None:
    batch = training(prepared).batch(0, range(2, 5))
    types = {key: (tuple(value.shape), value.dtype) for key, value in batch.items()}
    whole = ((3, SEQ_LENGTH), torch.int64)
    assert types == {
        "tokens": whole,
        "labels": whole,
        "position_ids": whole,
        "loss_mask": ((3, SEQ_LENGTH), torch.float32),
    }
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert batch["loss_mask"].all()
    assert batch["position_ids"][1].tolist() == list(range(SEQ_LENGTH))


def test_a_batch_is_the_same_however_it_is_split_and_reached(prepared: PreparedData) -> None:
    data = training(prepared)
    last = 3 * data.samples_per_epoch // GLOBAL_BATCH
    whole = [data.batch(step, range(GLOBAL_BATCH)) for step in range(last)]
    other = training(prepared)
    for step in random.Random(0).sample(range(last), last):
        parts = [other.batch(step, [row]) for row in range(GLOBAL_BATCH)]
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        assert same(whole[step], joined)
        assert len(other._epochs[0]._open) <= 2


def test_samples_do_not_depend_on_the_global_batch(prepared: PreparedData) -> None:
    small, large = training(prepared, global_batch=3), training(prepared, global_batch=6)
    whole = large.batch(4, range(6))
    for half in range(2):
        rows = {key: value[3 * half : 3 * half + 3] for key, value in whole.items()}
        assert same(small.batch(8 + half, range(3)), rows)


def test_epochs_differ_in_order_and_cover_the_same_tokens(prepared: PreparedData) -> None:
    data = training(prepared, global_batch=1)
    n = data.samples_per_epoch
    assert [data.indices(step)[0] for step in (0, n - 1, n, 2 * n)] == [
        (0, 0, 0), (0, 0, n - 1), (0, 1, 0), (0, 2, 0),
    ]  # fmt: skip
    epochs = [
        torch.cat([data.batch(step, [0])["tokens"] for step in range(first, first + n)])
        for first in (0, n)
    ]
    assert not torch.equal(*epochs)
    documents = IndexedDataset(prepared.train_prefix)
    tokens = Counter(int(t) for i in range(len(documents)) for t in documents[i])
    for epoch in epochs:
        left = tokens - Counter(epoch.flatten().tolist())
        assert left.total() == prepared.train_tokens - n * SEQ_LENGTH <= SEQ_LENGTH


def test_the_seed_changes_the_order(prepared: PreparedData) -> None:
    rows = range(GLOBAL_BATCH)
    assert not same(training(prepared, seed=1).batch(0, rows), training(prepared).batch(0, rows))


def test_ranks_share_no_files_and_print_nothing(
    prepared: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = sorted(prepared.folder.rglob("*"))
    expected = training(prepared).batch(0, range(GLOBAL_BATCH))
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with caplog.at_level(logging.INFO):
            assert same(training(prepared).batch(0, range(GLOBAL_BATCH)), expected)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert sorted(prepared.folder.rglob("*")) == before


def test_validation_is_a_fixed_set_of_whole_batches(prepared: PreparedData) -> None:
    options = {"seq_length": SEQ_LENGTH, "global_batch": 2}
    everything = ValidationData(prepared, num_tokens=10**9, **options)
    assert everything.num_batches == (prepared.validation_tokens - 1) // SEQ_LENGTH // 2
    some = ValidationData(prepared, num_tokens=2 * 2 * SEQ_LENGTH + 5, **options)
    assert some.num_batches == 2
    for number in range(2):
        left, right = (data.batch(number, range(2)) for data in (some, everything))
        assert same(left, right)
    assert not same(some.batch(0, [0]), some.batch(1, [0]))
    with pytest.raises(AssertionError):
        some.batch(2, [0])


@pytest.mark.parametrize(("seq_length", "global_batch"), [(16, 10**6), (10**6, 1)])
def test_text_too_short_for_one_batch(
    seq_length: int, global_batch: int, prepared: PreparedData
) -> None:
    needed = seq_length * global_batch
    options = {"seq_length": seq_length, "global_batch": global_batch}
    message = f"training text has {prepared.train_tokens} tokens, .* needs {needed + 1} "
    with pytest.raises(DataError, match=message):
        TrainingData(prepared, seed=1, **options)
    message = f"validation text has {prepared.validation_tokens} tokens, .* needs {needed + 1} "
    with pytest.raises(DataError, match=message):
        ValidationData(prepared, num_tokens=needed, **options)
    with pytest.raises(DataError, match=f"validation_tokens: {needed - 1} .* = {needed} tokens"):
        ValidationData(prepared, num_tokens=needed - 1, **options)
