"""Batches of fixed-length samples that depend on the seed and the step, and on nothing else."""

import math
from collections.abc import Sequence

import torch
import xxhash
from megatron.core.datasets.utils import Split

from lag_megatron.config import DataConfig
from lag_megatron.data.batch import Batch
from lag_megatron.data.datasets.blended_dataset import Prepared
from lag_megatron.data.datasets.indexed_dataset import open_documents
from lag_megatron.data.datasets.prepared_dataset import PreparedSource
from lag_megatron.data.objectives.registry import Epochs, open_samples
from lag_megatron.errors import DataError
from lag_megatron.planning.blend import Blend

_CAUSAL = DataConfig(objective="causal")
_VALIDATION_SEED = 0


class TrainingData:
    """Global batches of training samples, the same whatever the world size and run length.

    Sample i of the run comes from the source that the weights' order names (see
    :class:`~lag_megatron.planning.blend.Blend`), and is that source's j-th.  Megatron's datasets
    order their samples by the number of epochs that they are built for, so each epoch of a source
    gets its own, of one epoch, seeded by (seed, source, epoch): sample j of a source is sample
    ``j % samples`` of its epoch ``j // samples``.

    Args:
        prepared: tokens and tokenizer, of one source or of a mixture.
        seq_length: tokens per sample.
        global_batch: samples per step, of all ranks together.
        seed: of the order of samples.
        data: names the objective; the default is next-token prediction.

    Attributes:
        samples_per_epoch: samples of one epoch of each source, all together.

    Raises:
        DataError: if an epoch of a source does not fill its part of one global batch, or the
            tokenizer does not suit the objective.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        seq_length: int,
        global_batch: int,
        seed: int,
        data: DataConfig = _CAUSAL,
    ) -> None:
        self._blend = Blend([source.weight for source in prepared.sources])
        self._global_batch = global_batch
        self._epochs = []
        tokenizer = prepared.tokenizer()
        for source, share in zip(prepared.sources, self._blend.shares, strict=True):
            epochs = Epochs(
                data,
                source.data.train_prefix,
                tokenizer,
                seq_length=seq_length,
                seed=_seed_of(source, seed),
            )
            if epochs.samples_per_epoch < share * global_batch:
                raise _too_short(
                    "training", source, epochs.samples_per_epoch, seq_length, global_batch, share,
                    data,
                )  # fmt: skip
            self._epochs.append(epochs)
        self.samples_per_epoch = sum(epochs.samples_per_epoch for epochs in self._epochs)

    def indices(self, step: int) -> list[tuple[int, int, int]]:
        """Return (source, epoch, sample of the epoch) of each row of a step's global batch."""
        first = step * self._global_batch
        places = []
        for sample in range(first, first + self._global_batch):
            source, number = self._blend.place(sample)
            places.append((source, *divmod(number, self._epochs[source].samples_per_epoch)))
        return places

    def samples_by_source(self, step: int) -> list[int]:
        """How many samples of each source the first ``step`` global batches have."""
        return self._blend.drawn(step * self._global_batch)

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Return some rows of the global batch of a step.

        Args:
            step: step of the run, from 0.
            rows: row numbers within the global batch, from 0.

        Returns:
            The tensors of the objective's samples, stacked along a first dimension of rows.
        """
        _check_rows(rows, self._global_batch)
        places = self.indices(step)
        chosen = (places[row] for row in rows)
        return _stack([self._epochs[source].sample(epoch, i) for source, epoch, i in chosen])


class ValidationData:
    """A fixed set of validation samples, in global batches, of each source its share by weight.

    Args:
        prepared: tokens and tokenizer, of one source or of a mixture.
        seq_length: tokens per sample.
        global_batch: samples per batch, of all ranks together.
        num_tokens: tokens to validate on at most; rounded down to whole batches.
        data: names the objective; the default is next-token prediction.

    Raises:
        DataError: if the validation text or ``num_tokens`` does not fill one global batch, or the
            tokenizer does not suit the objective.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        seq_length: int,
        global_batch: int,
        num_tokens: int,
        data: DataConfig = _CAUSAL,
    ) -> None:
        if num_tokens < global_batch * seq_length:
            raise DataError(
                f"data.validation_tokens: {num_tokens} tokens do not fill one global batch of "
                f"{global_batch} x {seq_length} = {global_batch * seq_length} tokens. "
                "Raise it to that at least."
            )
        tokenizer = prepared.tokenizer()
        self._samples = [
            open_samples(
                data,
                open_documents(source.data.validation_prefix),
                tokenizer,
                seq_length=seq_length,
                seed=_seed_of(source, _VALIDATION_SEED),
                split=Split.valid,
            )
            for source in prepared.sources
        ]
        self._blend = Blend([source.weight for source in prepared.sources])
        available = [len(samples) for samples in self._samples]
        longest = self._blend.longest(available, at_most=num_tokens // seq_length)
        if longest < global_batch:
            shares = self._blend.shares
            least = min(range(len(shares)), key=lambda i: available[i] / shares[i])
            raise _too_short(
                "validation", prepared.sources[least], available[least], seq_length, global_batch,
                shares[least], data,
            )  # fmt: skip
        self.num_batches = longest // global_batch
        self._global_batch = global_batch

    def batch(self, number: int, rows: Sequence[int]) -> Batch:
        """Return some rows of a global batch, in the form of :meth:`TrainingData.batch`."""
        assert 0 <= number < self.num_batches, f"batch {number} of {self.num_batches}"
        _check_rows(rows, self._global_batch)
        first = number * self._global_batch
        places = (self._blend.place(first + row) for row in rows)
        return _stack([self._samples[source][i] for source, i in places])


def _seed_of(source: PreparedSource, seed: int) -> int:
    """Sources of a mixture have orders of their own, whatever the others and their order."""
    return xxhash.xxh32_intdigest(f"{seed} {source.name}".encode()) if source.name else seed


def _stack(samples: Sequence[Batch]) -> Batch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def _check_rows(rows: Sequence[int], global_batch: int) -> None:
    assert rows, "no rows asked for"
    assert all(0 <= row < global_batch for row in rows), f"rows {rows} of {global_batch}"


def _too_short(
    part: str,
    source: PreparedSource,
    samples: int,
    seq_length: int,
    global_batch: int,
    share: float,
    data: DataConfig,
) -> DataError:
    remedy = "a larger data.validation_fraction" if part == "validation" else "more text"
    text = f"{part} text of data.mixture.{source.name}" if source.name else f"{part} text"
    tokens = source.data.train_tokens if part == "training" else source.data.validation_tokens
    needed = math.ceil(share * global_batch)
    batch = f"parallel.global_batch {global_batch}"
    if source.name:
        batch = f"{share:.1%} of {batch}"
    if data.objective == "mlm":
        return DataError(
            f"the {text} has {tokens} tokens, which make {samples} samples of sentences, but "
            f"one global batch needs {needed} ({batch}). Use {remedy}, or a smaller batch."
        )
    return DataError(
        f"the {text} has {tokens} tokens, but one global batch needs "
        f"{needed * seq_length + 1} ({batch} x "
        f"model.seq_length {seq_length} + 1). Use {remedy}, a smaller batch or shorter samples."
    )
