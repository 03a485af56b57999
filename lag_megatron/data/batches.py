"""Batches of fixed-length samples that depend on the seed and the step, and on nothing else."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import xxhash
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from lag_megatron.data.prepared import PreparedData
from lag_megatron.data.tokenizer import Tokenizer
from lag_megatron.errors import DataError

Batch = dict[str, torch.Tensor]

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_VALIDATION_SEED = 0


class TrainingData:
    """Global batches of training samples, the same whatever the world size and run length.

    Megatron's ``GPTDataset`` orders its samples by the number of epochs it is built for, so each
    epoch gets its own, of one epoch, seeded by (seed, epoch) and built when first needed. Sample i
    of the run is sample ``i % samples_per_epoch`` of epoch ``i // samples_per_epoch``.

    Args:
        prepared: tokens and tokenizer.
        seq_length: tokens per sample.
        global_batch: samples per step, of all ranks together.
        seed: of the order of samples.

    Raises:
        DataError: if an epoch does not fill one global batch.
    """

    def __init__(
        self, prepared: PreparedData, *, seq_length: int, global_batch: int, seed: int
    ) -> None:
        self.samples_per_epoch = _num_samples(prepared.train_tokens, seq_length)
        if self.samples_per_epoch < global_batch:
            raise _too_short("training", prepared.train_tokens, seq_length, global_batch)
        self._documents = _open_documents(prepared.train_prefix)
        self._tokenizer = prepared.tokenizer()
        self._seq_length = seq_length
        self._global_batch = global_batch
        self._seed = seed
        self._epochs: dict[int, GPTDataset] = {}

    def indices(self, step: int) -> list[tuple[int, int]]:
        """Return (epoch, sample of the epoch) for each row of the global batch of a step."""
        first = step * self._global_batch
        samples = range(first, first + self._global_batch)
        return [divmod(sample, self.samples_per_epoch) for sample in samples]

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Return some rows of the global batch of a step.

        Args:
            step: step of the run, from 0.
            rows: row numbers within the global batch, from 0.

        Returns:
            int64 ``tokens``, ``labels`` and ``position_ids`` and float32 ``loss_mask``, each of
            shape (rows, seq_length).
        """
        _check_rows(rows, self._global_batch)
        places = self.indices(step)
        # A batch touches two epochs at most; older ones are dropped.
        self._epochs = {epoch: self._epoch(epoch) for epoch in sorted({e for e, _ in places})}
        return _stack([self._epochs[epoch][index] for epoch, index in (places[r] for r in rows)])

    def _epoch(self, epoch: int) -> GPTDataset:
        if epoch in self._epochs:
            return self._epochs[epoch]
        dataset = _one_epoch(
            self._documents,
            tokenizer=self._tokenizer,
            seq_length=self._seq_length,
            seed=xxhash.xxh32_intdigest(f"{self._seed} {epoch}".encode()),
            split=Split.train,
        )
        assert len(dataset) == self.samples_per_epoch
        return dataset


class ValidationData:
    """A fixed set of validation samples, in global batches.

    Args:
        prepared: tokens and tokenizer.
        seq_length: tokens per sample.
        global_batch: samples per batch, of all ranks together.
        num_tokens: tokens to validate on at most; rounded down to whole batches.

    Raises:
        DataError: if the validation text or ``num_tokens`` does not fill one global batch.
    """

    def __init__(
        self, prepared: PreparedData, *, seq_length: int, global_batch: int, num_tokens: int
    ) -> None:
        if num_tokens < global_batch * seq_length:
            raise DataError(
                f"data.validation_tokens: {num_tokens} tokens do not fill one global batch of "
                f"{global_batch} x {seq_length} = {global_batch * seq_length} tokens. "
                "Raise it to that at least."
            )
        available = _num_samples(prepared.validation_tokens, seq_length)
        if available < global_batch:
            raise _too_short("validation", prepared.validation_tokens, seq_length, global_batch)
        self.num_batches = min(available, num_tokens // seq_length) // global_batch
        self._global_batch = global_batch
        self._samples = _one_epoch(
            _open_documents(prepared.validation_prefix),
            tokenizer=prepared.tokenizer(),
            seq_length=seq_length,
            seed=_VALIDATION_SEED,
            split=Split.valid,
        )

    def batch(self, number: int, rows: Sequence[int]) -> Batch:
        """Return some rows of a global batch, in the form of :meth:`TrainingData.batch`."""
        assert 0 <= number < self.num_batches, f"batch {number} of {self.num_batches}"
        _check_rows(rows, self._global_batch)
        first = number * self._global_batch
        return _stack([self._samples[first + row] for row in rows])


def _num_samples(tokens: int, seq_length: int) -> int:
    """Samples in one epoch: the last label needs one token more than the last sample."""
    return (tokens - 1) // seq_length


def _open_documents(prefix: str) -> IndexedDataset:
    """Memory-map tokens; nothing is read before it is needed."""
    with _without_logging():
        return IndexedDataset(prefix)


def _one_epoch(
    documents: IndexedDataset, *, tokenizer: Tokenizer, seq_length: int, seed: int, split: Split
) -> GPTDataset:
    """One pass over all documents, in an order of documents and samples drawn from ``seed``.

    Every rank builds the indices in its own memory (12 bytes a sample): without a blend in its
    configuration Megatron neither reads nor writes index files, so ranks cannot race for them.
    """
    with _without_logging():
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        indices = np.arange(len(documents), dtype=np.int32)
        return GPTDataset(documents, documents.path_prefix, indices, None, split, config)


def _stack(samples: Sequence[Batch]) -> Batch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in _KEYS}


def _check_rows(rows: Sequence[int], global_batch: int) -> None:
    assert rows, "no rows asked for"
    assert all(0 <= row < global_batch for row in rows), f"rows {rows} of {global_batch}"


def _too_short(part: str, tokens: int, seq_length: int, global_batch: int) -> DataError:
    remedy = "a larger data.validation_fraction" if part == "validation" else "more text"
    return DataError(
        f"the {part} text has {tokens} tokens, but one global batch needs "
        f"{global_batch * seq_length + 1} (parallel.global_batch {global_batch} x "
        f"model.seq_length {seq_length} + 1). Use {remedy}, a smaller batch or shorter samples."
    )


@contextmanager
def _without_logging() -> Iterator[None]:
    """Silence Megatron, which warns at every build that it saves no index files."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
