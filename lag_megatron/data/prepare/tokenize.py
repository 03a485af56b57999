"""Chunks of text to parts of tokens, committed one by one, and parts to the final files."""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from lag_megatron.data.datasets.checksums import checksum
from lag_megatron.data.datasets.tokenizer import Tokenizer, load_tokenizer
from lag_megatron.data.prepare.corpus import Corpus, reread_chunk
from lag_megatron.data.prepare.sources import Chunk, TextSource
from lag_megatron.data.prepare.worker_pool import WorkerPool

SPLITS = ("train", "validation")
_READ_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class _EncodeTask:
    """One chunk to encode.

    Attributes:
        source: of the chunk.
        chunk: what to read.
        digest: of its texts.
        validation: of each document whether it is validated on, (documents,) bool.
        prefix: path of the part; its files begin with it.
        tokenizer: path of the tokenizer.json.
        sentences: store each sentence as a sequence of its document.
    """

    source: TextSource
    chunk: Chunk
    digest: str
    validation: np.ndarray
    prefix: Path
    tokenizer: Path
    sentences: bool


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Counts over the tokens that were written.

    Attributes:
        documents: of each split.
        unigrams: how often each token occurs in each split, (splits, vocabulary) int64.
    """

    documents: tuple[int, ...]
    unigrams: np.ndarray


def encode_corpus(
    corpus: Corpus,
    validation: np.ndarray,
    *,
    tokenizer: Path,
    parts: Path,
    sentences: bool,
    workers: WorkerPool,
) -> None:
    """Write every chunk's tokens below ``parts``; those that are there already are kept.

    Args:
        corpus: the text.
        validation: of each document whether it is validated on, (documents,) bool.
        tokenizer: path of the tokenizer.json.
        parts: folder, of this corpus, split and tokenizer alone.
        sentences: store each sentence as a sequence of its document.
        workers: processes that encode.

    Raises:
        DataError: if a file was changed since the corpus was opened.
    """
    parts.mkdir(exist_ok=True)
    tasks = [
        _EncodeTask(
            corpus.source,
            chunk,
            corpus.digests[number],
            corpus.part(validation, number),
            part_prefix(parts, number),
            tokenizer,
            sentences,
        )
        for number, chunk in enumerate(corpus.chunks)
    ]
    missing = [task for task in tasks if not _is_complete(task)]
    for _ in workers.map(_encode, missing, label=f"encoding {corpus.source.name}"):
        pass


def part_prefix(parts: Path, number: int) -> Path:
    """What the files of a chunk's part begin with."""
    return parts / f"{number:06d}"


def join_parts(parts: Sequence[Path], folder: Path, tokenizer: Tokenizer) -> Encoded:
    """Write ``train`` and ``validation`` ``.bin`` and ``.idx`` into a folder, chunk after chunk."""
    documents = []
    unigrams = np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    for split, counts in zip(SPLITS, unigrams, strict=True):
        builder = IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=dtype)
        try:
            for part in parts:
                prefix = f"{part}.{split}"
                builder.add_index(prefix)
                for tokens in _tokens_of(Path(f"{prefix}.bin"), dtype):
                    counts += np.bincount(tokens, minlength=len(counts))
            documents.append(len(builder.document_indices) - 1)
            builder.finalize(str(folder / f"{split}.idx"))
        finally:
            builder.data_file.close()
    return Encoded(tuple(documents), unigrams)


def _is_complete(task: _EncodeTask) -> bool:
    """Whether an earlier call committed this part."""
    path = _record_path(task)
    return path.is_file() and path.read_bytes() == _record(task).encode()


def _encode(task: _EncodeTask) -> None:
    tokenizer = _tokenizer(task.tokenizer)
    texts = reread_chunk(task.source, task.chunk, count=len(task.validation), digest=task.digest)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builders = [
        IndexedDatasetBuilder(f"{task.prefix}.{split}.bin", dtype=dtype) for split in SPLITS
    ]
    try:
        for validation, (ids, lengths) in zip(
            task.validation, _documents(tokenizer, texts, sentences=task.sentences), strict=True
        ):
            if len(ids):
                builders[int(validation)].add_document(ids, lengths)
        for split, builder in zip(SPLITS, builders, strict=True):
            builder.finalize(f"{task.prefix}.{split}.idx")
    finally:
        for builder in builders:
            builder.data_file.close()
    _record_path(task).write_text(_record(task), encoding="utf-8")


def _documents(
    tokenizer: Tokenizer, texts: Iterable[str], *, sentences: bool
) -> Iterator[tuple[np.ndarray, list[int]]]:
    if sentences:
        return tokenizer.encode_documents(texts, sentences=True)
    return ((ids, [len(ids)]) for ids in tokenizer.encode_documents(texts))


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    """Each process reads it once."""
    return load_tokenizer(path)


def _files_of(task: _EncodeTask) -> list[Path]:
    return [Path(f"{task.prefix}.{split}{end}") for split in SPLITS for end in (".bin", ".idx")]


def _record_path(task: _EncodeTask) -> Path:
    return Path(f"{task.prefix}.json")


def _record(task: _EncodeTask) -> str:
    """The content of a part's record, which is written after its other files.

    Its checksums show whether a part is complete, after a power failure too, without an fsync for
    each of many small files.
    """
    files = {path.name: checksum(path) for path in _files_of(task) if path.is_file()}
    return json.dumps({"digest": task.digest, "files": files})


def _tokens_of(path: Path, dtype: type[np.number]) -> Iterator[np.ndarray]:
    with path.open("rb") as stream:
        while len(tokens := np.fromfile(stream, dtype=dtype, count=_READ_TOKENS)):
            yield tokens
