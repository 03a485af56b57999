"""Megatron's ``.bin`` and ``.idx`` files of tokens, opened without its log messages."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.datasets.indexed_dataset import IndexedDataset


def open_documents(prefix: str) -> IndexedDataset:
    """Memory-map ``prefix.bin`` and ``prefix.idx``; nothing is read before it is needed."""
    with without_logging():
        return IndexedDataset(prefix)


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
