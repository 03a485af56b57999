"""The documents of a source: counted, measured and hashed without holding them in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from lag_megatron.config.schema.data import DataConfig, SourceConfig
from lag_megatron.data.prepare.readers import read_chunk
from lag_megatron.data.prepare.sources import CHUNK_BYTES, Chunk, TextSource
from lag_megatron.data.prepare.worker_pool import WorkerPool
from lag_megatron.errors import DataError

_DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Corpus:
    """The documents that hold text, in a deterministic order.

    Attributes:
        source: where they come from.
        chunks: of the source.
        first: number of each chunk's first document and, last, that of all documents,
            (chunks + 1,) int64.
        sizes: bytes of each document in UTF-8, (documents,) int64.
        digests: 32 hex digits over the texts of each chunk.
        content_hash: 32 hex digits over texts and order, whatever the files' names and the chunks.
        skipped_files: empty documents and, of the standard library, files that are not UTF-8.
    """

    source: TextSource
    chunks: tuple[Chunk, ...]
    first: np.ndarray
    sizes: np.ndarray
    digests: tuple[str, ...]
    content_hash: str
    skipped_files: int

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def bytes(self) -> int:
        """Bytes of text, in UTF-8."""
        return int(self.sizes.sum())

    def part(self, mask: np.ndarray, chunk: int) -> np.ndarray:
        """What a mask over all documents, (documents,), says of one chunk's."""
        return mask[self.first[chunk] : self.first[chunk + 1]]

    def texts(self, wanted: np.ndarray | None = None) -> Iterator[str]:
        """The documents for which the mask ``wanted``, (documents,) bool, holds; None is all.

        Raises:
            DataError: if a file has gone or was changed since the corpus was opened.
        """
        mask = np.ones(len(self), dtype=bool) if wanted is None else wanted
        for number, chunk in enumerate(self.chunks):
            part = self.part(mask, number)
            if part.any():
                texts = reread_chunk(
                    self.source, chunk, count=len(part), digest=self.digests[number]
                )
                yield from (text for text, take in zip(texts, part, strict=True) if take)


def open_corpus(
    config: DataConfig | SourceConfig,
    *,
    workers: WorkerPool | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Corpus:
    """Find, check, measure and hash every document of a source, reading each once.

    Args:
        config: names the source.
        workers: processes that read; None is this one.
        chunk_bytes: of the files, read at a time by a worker.

    Raises:
        DataError: for paths that name nothing, files that cannot be read, text that is not UTF-8
            (passed over in the standard library), bad lines or rows, or no text at all.
    """
    source = TextSource.of(config)
    chunks = source.chunks(chunk_bytes)
    whole = xxhash.xxh3_128()
    sizes, digests, skipped = [], [], 0
    label = "reading" if isinstance(config, DataConfig) else f"reading {config.name}"
    for found in (workers or WorkerPool()).map(_scan, [(source, c) for c in chunks], label=label):
        whole.update(found.digests)
        sizes.append(found.sizes)
        digests.append(xxhash.xxh3_128_hexdigest(found.digests))
        skipped += found.skipped
    counts = [len(part) for part in sizes]
    if not sum(counts):
        raise DataError(
            f"{source.where}.source {source.kind!r}: no text found ({skipped} empty or unreadable "
            "documents). Expected UTF-8 text in at least two documents."
        )
    return Corpus(
        source=source,
        chunks=tuple(chunks),
        first=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        sizes=np.concatenate(sizes),
        digests=tuple(digests),
        content_hash=whole.hexdigest(),
        skipped_files=skipped,
    )


def reread_chunk(source: TextSource, chunk: Chunk, *, count: int, digest: str) -> Iterator[str]:
    """The documents of a chunk, of which there must be ``count`` with the corpus's ``digest``.

    Raises:
        DataError: if the files were changed since the corpus was opened, at the latest after the
            last document.
    """
    found = xxhash.xxh3_128()
    for number, text in enumerate(filter(None, read_chunk(source, chunk))):
        if number == count:
            raise _changed(chunk)
        found.update(_digest(text.encode()))
        yield text
    if found.hexdigest() != digest:
        raise _changed(chunk)


@dataclass(frozen=True, slots=True, eq=False)
class _Scan:
    sizes: np.ndarray
    digests: bytes
    skipped: int


def _scan(task: tuple[TextSource, Chunk]) -> _Scan:
    sizes, digests, skipped = [], [], 0
    for text in read_chunk(*task):
        if text:
            data = text.encode()
            sizes.append(len(data))
            digests.append(_digest(data))
        else:
            skipped += 1
    return _Scan(np.asarray(sizes, dtype=np.int64), b"".join(digests), skipped)


def _digest(data: bytes) -> bytes:
    """Of fixed length, so that corpora that cut one text into other documents stay apart."""
    digest = xxhash.xxh3_128_digest(data)
    assert len(digest) == _DIGEST_BYTES
    return digest


def _changed(chunk: Chunk) -> DataError:
    files = str(chunk[0].path) if len(chunk) == 1 else f"{chunk[0].path} to {chunk[-1].path}"
    return DataError(
        f"{files}: changed while the text was being prepared. Leave the files alone meanwhile, and "
        "start again."
    )
