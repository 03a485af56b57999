"""Micro-batches: one data-parallel rank's part of every global batch."""

import copy
from collections.abc import Callable, Iterator

import torch

from lag_megatron.config import ParallelConfig, RunConfig
from lag_megatron.data.batch import Batch, normalize_batch
from lag_megatron.data.datasets.blended_dataset import Prepared
from lag_megatron.data.global_batches import TrainingData, ValidationData
from lag_megatron.data.prefetch import Prefetcher
from lag_megatron.distributed.world import World


class BatchLoader:
    """Cuts global batches into the micro-batches of one data-parallel rank.

    Tensor-parallel ranks of a replica get the same rows.

    Args:
        prepared: tokens and tokenizer.
        config: of the run.
        world: says which rows are this rank's.
        prefetch: make batches in a thread and in pinned memory, one step before they are used.
    """

    def __init__(
        self, prepared: Prepared, config: RunConfig, world: World, *, prefetch: bool = False
    ) -> None:
        model, data, batch = config.model, config.data, config.parallel.global_batch
        self._training = TrainingData(
            prepared, seq_length=model.seq_length, global_batch=batch, seed=data.seed, data=data
        )
        self._validation = ValidationData(
            prepared,
            seq_length=model.seq_length,
            global_batch=batch,
            num_tokens=data.validation_tokens,
            data=data,
        )
        self._names = [source.name for source in prepared.sources]
        self._seq_length = model.seq_length
        self._validation_tokens = self._validation.num_batches * batch * model.seq_length
        self._parallel = config.parallel
        self._prefetches = prefetch
        self._cut_for(world)

    def for_world(self, world: World) -> "BatchLoader":
        """The same global batches, cut for the ranks of another world."""
        other = copy.copy(self)
        other._cut_for(world)
        return other

    @property
    def validation_tokens(self) -> int:
        """Tokens of one evaluation, all ranks together."""
        return self._validation_tokens

    def tokens_by_source(self, step: int) -> dict[str, int]:
        """Tokens that the first ``step`` steps take from each source; empty for a single one."""
        if len(self._names) == 1:
            return {}
        drawn = self._training.samples_by_source(step)
        return {n: d * self._seq_length for n, d in zip(self._names, drawn, strict=True)}

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global batch ``step``."""
        return self._steps.take(step) if self._steps else self._training_parts(step)

    def validation(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each batch of the fixed validation set."""
        count = self._validation.num_batches
        if self._evaluations:
            yield from self._evaluations.each(count)
        else:
            yield from map(self._validation_parts, range(count))

    def _cut_for(self, world: World) -> None:
        self._rows = _rows_of(self._parallel, world)
        self._steps = Prefetcher(self._pinned(self._training_parts)) if self._prefetches else None
        self._evaluations = (
            Prefetcher(self._pinned(self._validation_parts)) if self._prefetches else None
        )

    def _training_parts(self, step: int) -> list[Batch]:
        return [self._training.batch(step, rows) for rows in self._rows]

    def _validation_parts(self, number: int) -> list[Batch]:
        return [self._validation.batch(number, rows) for rows in self._rows]

    @staticmethod
    def _pinned(make: Callable[[int], list[Batch]]) -> Callable[[int], list[Batch]]:
        """``make`` into pinned memory, from which copies to the device are asynchronous."""
        if not torch.cuda.is_available():
            return make
        return lambda number: [
            {name: tensor.pin_memory() for name, tensor in normalize_batch(part).items()}
            for part in make(number)
        ]


def _rows_of(parallel: ParallelConfig, world: World) -> list[range]:
    """Rows of the global batch that each micro-batch of this rank takes."""
    rows = parallel.global_batch // world.data_size
    first, size = world.data_rank * rows, parallel.micro_batch
    return [range(low, low + size) for low in range(first, first + rows, size)]
