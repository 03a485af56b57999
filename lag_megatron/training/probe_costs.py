"""What the probes of a growth event cost in FLOPs and memory, from the run's configuration."""

from lag_megatron.config import RunConfig
from lag_megatron.growth.pool import Candidate
from lag_megatron.planning.cost import (
    parameter_count,
    state_bytes_per_parameter,
    steps_flops,
    tokens_per_step,
    validation_flops_per_token,
)
from lag_megatron.planning.random_paths import with_path_length
from lag_megatron.search.event import GrowthEvent
from lag_megatron.search.step_costs import StepCosts


def step_costs(
    config: RunConfig, event: GrowthEvent, *, vocab_size: int, validation_tokens: int
) -> StepCosts:
    """Costs of the model that ``event`` grows to.

    Args:
        config: of the run.
        event: the growth event.
        vocab_size: rows of the vocabulary, padding included.
        validation_tokens: tokens of one evaluation, all ranks together.
    """

    def training_flops(candidate: Candidate, steps: int) -> int:
        # A candidate may have paths of its own, which leave layers out.
        own = with_path_length(config, event.number, candidate.path_length)
        taken = range(event.base_step, event.base_step + steps)
        return steps_flops(own, taken, vocab_size=vocab_size)

    per_token = validation_flops_per_token(
        config, num_layers=event.target_layers, vocab_size=vocab_size
    )
    return StepCosts(
        tokens_per_step=tokens_per_step(config),
        training_flops=training_flops,
        evaluation_flops=validation_tokens * per_token,
    )


def state_bytes(
    config: RunConfig, event: GrowthEvent, replicas: int, *, vocab_size: int, tensor: int
) -> float:
    """Bytes of training state on one rank of a probe group.

    Args:
        config: of the run.
        event: the growth event.
        replicas: data-parallel replicas of the group, among which ZeRO shards the state.
        vocab_size: rows of the vocabulary, padding included.
        tensor: tensor-parallel ranks.
    """
    parameters = parameter_count(
        config.model, num_layers=event.target_layers, vocab_size=vocab_size, tensor=tensor
    )
    widths = state_bytes_per_parameter(
        config.parallel, replicas=replicas, optimizer=config.optimizer.name
    )
    width = sum(widths.values())
    if event.growth.compared_by == "ema":  # the average of the fp32 weights lies beside them
        width += 4 / (replicas if config.parallel.zero_stage else 1)
    return parameters * width
