"""Opening the samples of an objective over prepared text, epoch by epoch."""

from typing import Protocol

import torch
import xxhash
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from lag_megatron.config import DataConfig
from lag_megatron.data.datasets.indexed_dataset import open_documents
from lag_megatron.data.datasets.tokenizer import Tokenizer
from lag_megatron.data.objectives.causal import CausalSamples
from lag_megatron.data.objectives.mlm import MlmSamples
from lag_megatron.data.objectives.ul2 import Ul2Samples
from lag_megatron.errors import DataError


class Samples(Protocol):
    """One pass over a text: tensors by key, of the same keys and shapes for every sample."""

    def __len__(self) -> int:
        """Samples of the pass."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sample, the same one however often and in whatever order they are read."""


def open_samples(
    data: DataConfig,
    documents: IndexedDataset,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    seed: int,
    split: Split,
) -> Samples:
    """One pass over the documents as samples of ``data.objective``.

    No pass differs from another in its number of samples.

    Args:
        data: names the objective and holds its options.
        documents: as the objective needs them (for mlm one sequence a sentence).
        tokenizer: the one that made them.
        seq_length: of a sample.
        seed: of the order, and of all that is random in a sample.
        split: whose text it is.

    Raises:
        DataError: if the tokenizer lacks tokens that the objective needs.
    """
    if data.objective == "mlm":
        return MlmSamples(documents, tokenizer, data.mlm, seq_length=seq_length, seed=seed)
    windows = CausalSamples(documents, tokenizer, seq_length=seq_length, seed=seed, split=split)
    if data.objective == "ul2":
        return Ul2Samples(windows, tokenizer, data.ul2, seq_length=seq_length, seed=seed)
    return windows


class Epochs:
    """Endless passes over one prepared text, each with a seed of its own, opened when needed.

    Args:
        data: names the objective.
        prefix: path of the tokens without ``.bin`` or ``.idx``.
        tokenizer: the one that made them.
        seq_length: of a sample.
        seed: pass ``e`` is seeded by (seed, e).

    Attributes:
        samples_per_epoch: samples of each pass.

    Raises:
        DataError: if the tokenizer lacks tokens that the objective needs.
    """

    def __init__(
        self, data: DataConfig, prefix: str, tokenizer: Tokenizer, *, seq_length: int, seed: int
    ) -> None:
        self._data = data
        self._prefix = prefix
        self._documents = open_documents(prefix)
        self._tokenizer = tokenizer
        self._seq_length = seq_length
        self._seed = seed
        self._open: dict[int, Samples] = {}
        self.samples_per_epoch = len(self._epoch(0))

    def sample(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        """Return sample ``index`` of pass ``epoch``.

        Raises:
            DataError: if it has a token that the tokenizer has not.
        """
        sample = self._epoch(epoch)[index]
        low, high = (int(bound) for bound in torch.aminmax(sample["tokens"]))
        if low < 0 or high >= self._tokenizer.vocab_size:
            raise DataError(
                f"{self._prefix}.bin: has token {high if low >= 0 else low}, expected tokens from "
                f"0 to {self._tokenizer.vocab_size - 1}: the prepared data was damaged. Restore "
                "the file, or delete its folder and prepare it again."
            )
        return sample

    def _epoch(self, epoch: int) -> Samples:
        if epoch not in self._open:
            samples = open_samples(
                self._data,
                self._documents,
                self._tokenizer,
                seq_length=self._seq_length,
                seed=xxhash.xxh32_intdigest(f"{self._seed} {epoch}".encode()),
                split=Split.train,
            )
            # A batch touches two passes at most, so only the last one is worth keeping.
            self._open = {**dict(list(self._open.items())[-1:]), epoch: samples}
        return self._open[epoch]
