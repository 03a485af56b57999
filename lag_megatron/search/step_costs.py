"""What training and evaluating the candidates of one growth event costs."""

from collections.abc import Callable
from dataclasses import dataclass

from lag_megatron.growth.pool import Candidate


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Costs of the model that an event grows to, all ranks together.

    Attributes:
        tokens_per_step: tokens of one global batch.
        training_flops: floating-point operations of a candidate's first so many steps after growth.
        evaluation_flops: floating-point operations of one pass over the validation set.
    """

    tokens_per_step: int
    training_flops: Callable[[Candidate, int], int]
    evaluation_flops: int
