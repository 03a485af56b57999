"""Megatron's ``.bin`` and ``.idx`` files of tokens, opened without its log messages."""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from lag_megatron.errors import DataError

# What Megatron's reader raises for an index that is cut short or holds other values.
_DAMAGE = (OSError, ValueError, TypeError, KeyError, IndexError, AssertionError, struct.error)


def open_documents(prefix: str) -> IndexedDataset:
    """Memory-map ``prefix.bin`` and ``prefix.idx``; no token is read before it is needed.

    Raises:
        DataError: if the index cannot be read, or names tokens that the other file has not.
    """
    documents = IndexedDataset.__new__(IndexedDataset)
    # Its destructor expects both, also where its constructor has failed before they were set.
    documents.bin_reader = documents.index = None
    try:
        with without_logging():
            documents.__init__(prefix)
        problem = _misfit(documents, Path(f"{prefix}.bin").stat().st_size)
    except _DAMAGE as error:
        problem = str(error) or type(error).__name__
    if problem:
        raise DataError(
            f"{prefix}.idx: cannot be read as Megatron's index of {prefix}.bin: {problem}. "
            "Restore both files, or delete their folder and prepare it again."
        )
    return documents


def _misfit(documents: IndexedDataset, size: int) -> str:
    """Why an index does not fit a ``.bin`` of ``size`` bytes; empty where it does."""
    index = documents.index
    lengths = np.asarray(index.sequence_lengths, dtype=np.int64)
    starts, ends = np.asarray(index.sequence_pointers), np.asarray(index.document_indices)
    if len(lengths) and (lengths.min() < 0 or starts.min() < 0):
        return "a length or a position is negative"
    if len(lengths) and int((starts + lengths * index.dtype_size).max()) > size:
        return f"it names tokens after the end of the file, which has {size:,} bytes"
    if len(ends) and (ends.min() < 0 or ends.max() > len(lengths) or (np.diff(ends) < 0).any()):
        return f"documents do not end at one of its {len(lengths):,} sequences"
    return ""


@contextmanager
def without_logging() -> Iterator[None]:
    """Suppress Megatron's warning at every build that it saves no index files."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
