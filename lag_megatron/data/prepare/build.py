"""One prepared folder: from a corpus and a tokenizer to Megatron's ``.bin`` and ``.idx`` files."""

import random
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from lag_megatron.atomic_io import flush_to_disk
from lag_megatron.config import DataConfig
from lag_megatron.data.datasets.checksums import BLOCKS, block_table, checksum
from lag_megatron.data.datasets.prepared_dataset import (
    META,
    TOKENIZER,
    UNIGRAMS,
    PreparedData,
)
from lag_megatron.data.datasets.tokenizer import Tokenizer, load_tokenizer
from lag_megatron.data.datasets.unigram import cross_entropy
from lag_megatron.data.prepare import staging_dir
from lag_megatron.data.prepare.corpus import Corpus
from lag_megatron.data.prepare.fingerprint import save_tokenizer
from lag_megatron.data.prepare.tokenize import SPLITS, encode_corpus, join_parts, part_prefix
from lag_megatron.data.prepare.worker_pool import WorkerPool
from lag_megatron.errors import DataError

_SAMPLE_BYTES = 1 << 20
_INDEX_BYTES_PER_DOCUMENT = 24
_DISK_MARGIN = 1.1


def validation_mask(corpus: Corpus, config: DataConfig, *, where: str = "data") -> np.ndarray:
    """Of each document whether it is validated on, drawn by ``data.seed``, (documents,) bool.

    Raises:
        DataError: if no document would be left to train on.
    """
    count = max(1, round(len(corpus) * config.validation_fraction))
    if count >= len(corpus):
        raise DataError(
            f"data.validation_fraction: {config.validation_fraction} of {len(corpus)} documents "
            f"({where}) leaves none to train on. Expected at least {count + 1} documents. Cut the "
            "text into more files or lines, or lower the fraction."
        )
    mask = np.zeros(len(corpus), dtype=bool)
    mask[random.Random(config.seed).sample(range(len(corpus)), count)] = True
    return mask


def open_complete(folder: Path, *, digest: str) -> PreparedData | None:
    """The complete dataset in ``folder``, or None.

    Raises:
        DataError: if it was made of something else, or is damaged.
    """
    if not (folder / META).is_file():
        return None
    prepared = PreparedData.open(folder)
    if prepared.digest != digest:
        raise DataError(
            f"{folder}: holds other prepared data: the text, the tokenizer or a setting differs "
            f"({prepared.digest} there, {digest} wanted). Give another folder, or delete this one."
        )
    return prepared


def build_folder(
    folder: Path,
    *,
    digest: str,
    corpus: Corpus,
    validation: np.ndarray,
    sentences: bool,
    make_tokenizer: Callable[[], Tokenizer],
    workers: WorkerPool,
) -> PreparedData:
    """Prepare a corpus into a folder, which appears when it is complete; or open it.

    Work in progress is kept chunk by chunk in ``<folder>.part``.  The files are the same whatever
    the workers, the chunks and the interruptions.

    Args:
        folder: to be made.
        digest: of all that shapes the files.
        corpus: the text.
        validation: of each document whether it is validated on, (documents,) bool.
        sentences: store each sentence as a sequence of its document.
        make_tokenizer: called once, also over several calls.
        workers: processes that encode.

    Raises:
        DataError: if ``folder`` holds other files, the disk is too small, or the text changes
            meanwhile.
    """
    work = folder.with_name(f"{folder.name}.part")
    if done := open_complete(folder, digest=digest):
        staging_dir.remove(work)  # after a kill between publishing and removing
        return done
    staging_dir.require_free(folder)
    with staging_dir.exclusive(work, digest=digest):
        if done := open_complete(folder, digest=digest):  # by the process that held the lock
            staging_dir.remove(work)
            return done
        tokenizer = _tokenizer(work / TOKENIZER, make_tokenizer)
        _require_disk_space(work, corpus, tokenizer)
        files = {"tokenizer": work / TOKENIZER, "parts": work / "parts"}
        encode_corpus(corpus, validation, **files, sentences=sentences, workers=workers)
        _assemble(work, digest=digest, corpus=corpus, sentences=sentences, tokenizer=tokenizer)
        staging_dir.publish(work / "whole", folder)
        staging_dir.remove(work)
    return PreparedData.open(folder)


def _tokenizer(path: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    if not path.is_file():
        save_tokenizer(make(), path)
    return load_tokenizer(path)


def _assemble(
    work: Path, *, digest: str, corpus: Corpus, sentences: bool, tokenizer: Tokenizer
) -> None:
    """Make the folder ``whole`` of all parts, meta.json last."""
    whole = work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    shutil.copyfile(work / TOKENIZER, whole / TOKENIZER)
    parts = [part_prefix(work / "parts", number) for number in range(len(corpus.chunks))]
    encoded = join_parts(parts, whole, tokenizer)
    for split, counts in zip(SPLITS, encoded.unigrams, strict=True):
        if not counts.any():
            raise DataError(
                f"{corpus.source.where}: the documents to {split} on give no tokens. "
                "Add text, or change data.validation_fraction."
            )
    np.save(whole / UNIGRAMS, encoded.unigrams)
    (whole / BLOCKS).write_text(block_table(whole / "train.bin"), encoding="utf-8")
    names = sorted(path.name for path in whole.iterdir())
    train, validation = (int(counts.sum()) for counts in encoded.unigrams)
    prepared = PreparedData(
        folder=whole,
        digest=digest,
        source=corpus.source.kind,
        sentences=sentences,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        train_tokens=train,
        validation_tokens=validation,
        train_documents=encoded.documents[0],
        validation_documents=encoded.documents[1],
        unigram_entropy=cross_entropy(encoded.unigrams),
        skipped_files=corpus.skipped_files,
        bytes=corpus.bytes,
        content_hash=corpus.content_hash,
        files={n: ((whole / n).stat().st_size, checksum(whole / n)) for n in names},
    )
    for name in names:
        flush_to_disk(whole / name)
    prepared.write_meta()
    flush_to_disk(whole / META)


def _require_disk_space(work: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Refuse a disk that cannot hold the tokens twice, once in parts and once joined.

    Raises:
        DataError: with what is needed and what is there.
    """
    item = np.dtype(DType.optimal_dtype(tokenizer.vocab_size)).itemsize
    free = shutil.disk_usage(work).free + _held_by(work / "parts")
    # A token stands for one byte at least, so most corpora are known to fit without a sample.
    index = 2 * _INDEX_BYTES_PER_DOCUMENT * len(corpus)
    if 2 * item * (corpus.bytes + len(corpus)) + index <= free:
        return
    texts = list(_sample(corpus))
    tokens = sum(len(ids) for ids in tokenizer.encode_documents(texts))
    per_byte = tokens / sum(len(text.encode()) for text in texts)
    needed = int((2 * item * per_byte * corpus.bytes + index) * _DISK_MARGIN)
    if needed > free:
        raise DataError(
            f"{work}: no room for the prepared data: about {needed / 1e9:.2f} GB are needed for "
            f"{corpus.bytes / 1e9:.2f} GB of text, {free / 1e9:.2f} GB are free. Free some disk, "
            "or put the data on another one."
        )


def _held_by(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def _sample(corpus: Corpus) -> Iterator[str]:
    """The first documents, about a megabyte."""
    count = int(np.searchsorted(np.cumsum(corpus.sizes), _SAMPLE_BYTES)) + 1
    return islice(corpus.texts(), count)
