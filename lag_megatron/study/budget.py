"""The planned cost of a run, and the longest last stage within a budget."""

import bisect
from dataclasses import dataclass, replace

from lag_megatron.config import RunConfig
from lag_megatron.growth.pool import growth_pools
from lag_megatron.planning.cost import training_flops
from lag_megatron.planning.search_cost import search_cost
from lag_megatron.planning.vocab_size import estimate_vocab_size


@dataclass(frozen=True, slots=True)
class PlannedCost:
    """Floating-point operations of a run's own steps and of its searches."""

    training: int
    search: int

    @property
    def total(self) -> int:
        """Both together; validating the run itself is not counted."""
        return self.training + self.search


class RunCostModel:
    """The planned cost of a configuration as a function of the length of its last stage.

    The size of the vocabulary is the dry run's: an estimate where the tokenizer is not there yet.

    Args:
        config: the run; the steps of its last stage do not matter.

    Attributes:
        vocab_size: rows of the embedding, on which costs depend.
        vocab_origin: where that number comes from.

    Raises:
        PlanError: if a growth of it is impossible.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.vocab_size, self.vocab_origin = estimate_vocab_size(config)
        self._pools = {stage: len(pool) for stage, pool in growth_pools(config).items()}

    def of(self, last_steps: int) -> PlannedCost:
        """The cost with that many steps in the last stage."""
        config = with_last_steps(self._config, last_steps)
        search = sum(
            search_cost(config, stage, candidates=pool, vocab_size=self.vocab_size).flops
            for stage, pool in self._pools.items()
        )
        return PlannedCost(training_flops(config, vocab_size=self.vocab_size), search)

    def steps_within(self, budget: int) -> int:
        """The most steps of the last stage that cost no more than ``budget``; 0 if none do.

        Where path lengths fall within that stage, more steps can cost less, and it may be one of
        the largest numbers only.
        """
        # Each step costs one layer's passes at the least, so doubling soon goes beyond.
        over = 1
        while self.of(over).total <= budget:
            over *= 2
        # What costs more with each step is searched for the last number that is allowed.
        found = bisect.bisect_right(range(over + 1), budget, key=lambda n: self.of(n).total)
        return max(found - 1, 0)


def with_last_steps(config: RunConfig, steps: int) -> RunConfig:
    """``config`` with a last stage of that many steps."""
    *earlier, last = config.stages
    return replace(config, stages=(*earlier, replace(last, steps=steps)))
