"""Next-token prediction: windows of the stream of all documents, by Megatron's GPTDataset."""

from functools import cached_property

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from lag_megatron.data.datasets.indexed_dataset import without_logging
from lag_megatron.data.datasets.tokenizer import Tokenizer

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class CausalSamples:
    """One pass over all documents, in an order of documents and samples drawn from the seed.

    Every rank builds the indices in its own memory (12 bytes a sample): without a blend in its
    configuration Megatron neither reads nor writes index files, so ranks cannot race for them.

    Args:
        documents: one sequence a document, its end included.
        tokenizer: the one that made them.
        seq_length: tokens per sample; the last label is the next sample's first token.
        seed: of the order.
        split: whose text it is.
    """

    def __init__(
        self,
        documents: IndexedDataset,
        tokenizer: Tokenizer,
        *,
        seq_length: int,
        seed: int,
        split: Split,
    ) -> None:
        self._documents = documents
        self._tokenizer = tokenizer
        self._seq_length = seq_length
        self._seed = seed
        self._split = split

    def __len__(self) -> int:
        # The last label needs one token more than the last sample.
        tokens = int(self._documents.sequence_lengths.sum(dtype=np.int64))
        return max(tokens - 1, 0) // self._seq_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """int64 ``tokens``, ``labels``, ``position_ids`` and float32 ``loss_mask``, (s,) each."""
        sample = self._dataset[index]
        return {key: sample[key] for key in _KEYS}

    @cached_property
    def _dataset(self) -> GPTDataset:
        with without_logging():
            config = GPTDatasetConfig(
                random_seed=self._seed,
                sequence_length=self._seq_length,
                tokenizer=self._tokenizer,
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            documents = self._documents
            indices = np.arange(len(documents), dtype=np.int32)
            made = GPTDataset(documents, documents.path_prefix, indices, None, self._split, config)
        assert len(made) == len(self)
        return made
