"""How a model is spread over ranks, and how many replicas of it that makes."""

from dataclasses import dataclass
from typing import Literal

from lag_megatron.config.schema.base import FORBID
from lag_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the work is spread; batches are counted in sequences.

    Attributes:
        tensor: ranks that share one replica of the model (tensor parallelism); above 0.
        zero_stage: DeepSpeed's ZeRO stage: what the data-parallel ranks share among them.
        micro_batch: sequences of a rank's forward pass; above 0.
        global_batch: sequences of an optimizer step, a multiple of ``micro_batch`` times the
            data-parallel ranks; above 0.
        precision: of weights and activations; masters and moments are fp32.
        sequence_parallel: between matrices that tensor parallelism cuts, each of its ranks holds a
            part of the sequence (Korthikanti et al. 2022); the same losses for less memory.
        recompute: ``layers`` keeps each layer's input alone and computes the rest again in the
            backward pass.
        cuda_graphs: the launches of a transformer layer are recorded once and replayed, with more
            memory; for steps so short that a GPU waits for its host.
        world_size: ranks, for a dry run without a hostfile; a run takes it from its launcher and
            refuses a different one; above 0.
        timeout: seconds after which a silent rank, or a collective that does not end, ends the
            run; above 0.
    """

    __pydantic_config__ = FORBID
    tensor: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    micro_batch: int = 8
    global_batch: int = 32
    precision: Literal["fp32", "bf16"] = "fp32"
    sequence_parallel: bool = False
    recompute: Literal["none", "layers"] = "none"
    cuda_graphs: bool = False
    world_size: int | None = None
    timeout: float = 300.0


def data_parallel_size(parallel: ParallelConfig, *, world_size: int) -> int:
    """Number of data-parallel replicas in a world of ``world_size`` ranks.

    Raises:
        ConfigError: if ranks or sequences do not divide evenly.
    """
    if parallel.world_size not in (None, world_size):
        raise ConfigError(
            f"parallel.world_size: configured for {parallel.world_size} ranks, but {world_size} "
            f"were started. Start {parallel.world_size} or change the key."
        )
    if world_size % parallel.tensor:
        raise ConfigError(
            f"parallel.tensor: {parallel.tensor} does not divide the world of {world_size} ranks. "
            f"Start a multiple of {parallel.tensor} ranks."
        )
    replicas = world_size // parallel.tensor
    if parallel.global_batch % (parallel.micro_batch * replicas):
        unit = parallel.micro_batch * replicas
        below = max(unit, parallel.global_batch // unit * unit)
        raise ConfigError(
            f"parallel.global_batch: {parallel.global_batch} sequences do not divide into "
            f"micro_batch {parallel.micro_batch} x {replicas} data-parallel ranks = {unit}. "
            f"Nearest: {below} or {below + unit}."
        )
    return replicas
