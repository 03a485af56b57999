"""What training and evaluating the candidates of one growth event costs."""

from collections.abc import Callable
from dataclasses import dataclass

from lag_megatron.config.schema.ranges import require_whole
from lag_megatron.errors import ConfigError
from lag_megatron.growth.pool import Candidate

_MAX_FLOPS = 10**30


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Costs of the model that an event grows to, all ranks together.

    Attributes:
        tokens_per_step: tokens of one global batch.
        training_flops: floating-point operations of a candidate's first so many steps after growth.
        evaluation_flops: floating-point operations of one pass over the validation set.

    Raises:
        ConfigError: if a number is not whole or is below 0.
    """

    tokens_per_step: int
    training_flops: Callable[[Candidate, int], int]
    evaluation_flops: int

    def __post_init__(self) -> None:
        require_whole(self.tokens_per_step, "tokens_per_step", error=ConfigError)
        require_whole(self.evaluation_flops, "evaluation_flops", error=ConfigError, most=_MAX_FLOPS)
