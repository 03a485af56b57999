"""From a source of text to Megatron's ``.bin`` and ``.idx`` files, made once and kept."""

import errno
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tqdm import tqdm

from lag_megatron.config import DataConfig
from lag_megatron.data.corpus import Corpus, Document, open_corpus
from lag_megatron.data.prepared import META, TOKENIZER, PreparedData
from lag_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from lag_megatron.errors import DataError

_FORMAT = 1
# More text barely changes the merges: 8 MB for 4096 tokens, 100 MB for 50 thousand.
_TRAINING_BYTES_PER_TOKEN = 2048


def prepare_data(config: DataConfig, *, cache_dir: Path) -> PreparedData:
    """Tokenize a corpus into ``cache_dir/<hash>``, or open what is already there.

    One process calls this; the others open the folder with :meth:`PreparedData.open`. The hash
    covers the texts and what shapes the files; a folder appears there only when it is complete.

    Raises:
        DataError: if the text, the tokenizer or the disk does not allow it.
    """
    start = time.monotonic()
    corpus = open_corpus(config)
    tokenizer = None
    if config.tokenizer.type == "file":
        tokenizer = load_tokenizer(Path(config.tokenizer.path or "").expanduser())
    folder = cache_dir / _digest(config, corpus, tokenizer)
    if (folder / META).is_file():
        return PreparedData.open(folder)
    train, validation = _split(corpus.documents, config)
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        tokenizer = tokenizer or _train_tokenizer(train, corpus, config.tokenizer.vocab_size)
        _build(building, corpus, tokenizer, train=train, validation=validation, start=start)
        _publish(building, folder)
    except OSError as error:
        raise _not_writable(cache_dir, error, corpus) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return PreparedData.open(folder)


def _digest(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> str:
    """32 hex digits over everything that shapes the files."""
    values = {
        "format": _FORMAT,
        "content": corpus.content_hash,
        "tokenizer": tokenizer.digest if tokenizer else f"bpe {config.tokenizer.vocab_size}",
        "validation_fraction": config.validation_fraction,
        "seed": config.seed,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _split(
    documents: Sequence[Document], config: DataConfig
) -> tuple[list[Document], list[Document]]:
    """Documents to train on and to validate on, shuffled.

    Raises:
        DataError: if either part would be empty.
    """
    shuffled = list(documents)
    random.Random(config.seed).shuffle(shuffled)
    count = max(1, round(len(shuffled) * config.validation_fraction))
    if count >= len(shuffled):
        raise DataError(
            f"data.validation_fraction: {config.validation_fraction} of {len(shuffled)} documents "
            f"leaves none to train on. Expected at least {count + 1} documents. Cut the text into "
            "more files or lines, or lower the fraction."
        )
    return shuffled[count:], shuffled[:count]


def _train_tokenizer(documents: Sequence[Document], corpus: Corpus, vocab_size: int) -> Tokenizer:
    def sample() -> Iterator[str]:
        left = vocab_size * _TRAINING_BYTES_PER_TOKEN
        for document in documents:
            text = corpus.read(document)[:left]
            yield text
            left -= len(text)
            if left <= 0:
                return

    return train_bpe(sample(), vocab_size=vocab_size)


def _build(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    train: Sequence[Document],
    validation: Sequence[Document],
    start: float,
) -> None:
    """Write all files of a prepared folder, meta.json last."""
    tokenizer.save(folder / TOKENIZER)
    train_counts = _encode(train, corpus, tokenizer, prefix=folder / "train")
    validation_counts = _encode(validation, corpus, tokenizer, prefix=folder / "validation")
    _fsync(*folder.iterdir())
    prepared = PreparedData(
        folder=folder,
        vocab_size=tokenizer.vocab_size,
        train_tokens=int(train_counts.sum()),
        validation_tokens=int(validation_counts.sum()),
        train_documents=len(train),
        validation_documents=len(validation),
        unigram_entropy=_cross_entropy(validation_counts, train_counts),
        skipped_files=corpus.skipped_files,
        bytes=corpus.bytes,
        content_hash=corpus.content_hash,
        seconds=round(time.monotonic() - start, 3),
    )
    prepared.write_meta()
    _fsync(folder / META, folder)


def _encode(
    documents: Sequence[Document], corpus: Corpus, tokenizer: Tokenizer, *, prefix: Path
) -> np.ndarray:
    """Write ``prefix.bin`` and ``prefix.idx`` and return how often each token occurs, (vocab,)."""
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    encoded = tokenizer.encode_documents(map(corpus.read, documents))
    quiet = not sys.stderr.isatty()
    try:
        bar = tqdm(encoded, prefix.name, len(documents), unit="document", disable=quiet)
        for ids in bar:
            builder.add_document(ids, [len(ids)])
            counts += np.bincount(ids, minlength=len(counts))
        builder.finalize(f"{prefix}.idx")
    finally:
        builder.data_file.close()
    return counts


def _cross_entropy(counts: np.ndarray, model_counts: np.ndarray) -> float:
    """Nats per token of ``counts`` under the frequencies of ``model_counts``, plus one each."""
    smoothed = model_counts + 1.0
    return float(-(counts @ np.log(smoothed / smoothed.sum())) / counts.sum())


def _publish(building: Path, folder: Path) -> None:
    """Rename a complete folder into place; one that another process put there first stays."""
    if folder.exists() and not (folder / META).is_file():
        shutil.rmtree(folder)
    try:
        building.rename(folder)
    except OSError:
        if not (folder / META).is_file():
            raise
    _fsync(folder.parent)


def _fsync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _not_writable(cache_dir: Path, error: OSError, corpus: Corpus) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{cache_dir}: no room left for the prepared data: {error.strerror}. Expected up to "
            f"{corpus.bytes / 1e6:.0f} MB for {corpus.bytes / 1e6:.0f} MB of text. Free some disk, "
            "or put the cache on another one."
        )
    return DataError(
        f"{cache_dir}: cannot write the prepared data: {error}. "
        "Expected a folder that this user may write to."
    )
