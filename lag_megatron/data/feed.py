"""This rank's part of every global batch."""

import copy
from collections.abc import Iterator

from lag_megatron.config import ParallelConfig, RunConfig
from lag_megatron.data.batches import Batch, TrainingData, ValidationData
from lag_megatron.data.blended import Prepared
from lag_megatron.parallel import World


class Feed:
    """Cuts global batches into the micro-batches of one data-parallel rank.

    Tensor-parallel ranks of a replica get the same rows.
    """

    def __init__(self, prepared: Prepared, config: RunConfig, world: World) -> None:
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
        self._rows = _rows_of(config.parallel, world)

    def on(self, world: World) -> "Feed":
        """The same global batches, cut for the ranks of another world."""
        other = copy.copy(self)
        other._rows = _rows_of(self._parallel, world)
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
        return [self._training.batch(step, rows) for rows in self._rows]

    def validation(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each batch of the fixed validation set."""
        for number in range(self._validation.num_batches):
            yield [self._validation.batch(number, rows) for rows in self._rows]


def _rows_of(parallel: ParallelConfig, world: World) -> list[range]:
    """Rows of the global batch that each micro-batch of this rank takes."""
    rows = parallel.global_batch // world.data_size
    first, size = world.data_rank * rows, parallel.micro_batch
    return [range(low, low + size) for low in range(first, first + rows, size)]
