"""The optimizer and its learning rate."""

from dataclasses import dataclass, field
from typing import Literal

from lag_megatron.config.schema.base import FORBID


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over optimizer steps.

    Attributes:
        warmup_steps: linear warm-up from 0.
        decay_steps: step at which the decay ends at ``min_lr``; null is the end of the run, or the
            furthest that the run comes in the schedule where a stage is put back in it.
        stable_steps: ``wsd``: step at which its decay begins; null is 0.8 of ``decay_steps``.
        growth_warmup_steps: after each growth the rate rises linearly from 0 again, for so many
            steps, to what the schedule says there: its value times 1/n, 2/n, ..., 1.
        growth_warmup: whether it does so for all parameters, or for those of new layers alone.
    """

    __pydantic_config__ = FORBID
    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    stable_steps: int | None = None
    min_lr: float = 0.0
    growth_warmup_steps: int = 0
    growth_warmup: Literal["all", "new"] = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Weight decay acts on matrices, not on biases and norms.

    ``adafactor`` is factored (Shazeer and Stern 2018) and runs without ZeRO alone, whose flat
    partitions have no rows and columns; ``betas`` and ``eps`` are AdamW's.  Its ``lr`` is relative
    to each parameter's own scale; T5 and UL2 take 0.01, no weight decay and no ``grad_clip``.
    ``one_pass`` makes AdamW's step under ZeRO 1 to 3 a single pass over each rank's partition;
    false leaves it to DeepSpeed, with the same result but for the rounding of the gradient norm.
    """

    __pydantic_config__ = FORBID
    name: Literal["adamw", "adafactor"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    one_pass: bool = True
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
