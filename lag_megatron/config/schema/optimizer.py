"""The optimizer and its learning rate."""

from dataclasses import dataclass, field
from typing import Literal

from lag_megatron.config.schema.base import FORBID


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over optimizer steps.

    Attributes:
        name: shape of the curve after the warm-up; ``wsd`` is stable, then falls linearly.
        warmup_steps: steps of linear warm-up from 0; 0 or more.
        decay_steps: step at which the decay ends at ``min_lr``; null is the end of the run, or the
            largest position in the schedule that the run reaches.
        stable_steps: for ``wsd``, the step at which its decay begins; null is 0.8 of
            ``decay_steps``; 0 or more.
        min_lr: the rate at the end of the decay, at most ``lr``; 0 or more.
        growth_warmup_steps: steps after each growth in which the rate rises linearly from 0 to the
            schedule's value; 0 or more.
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
    partitions have no rows and columns; T5 and UL2 take it with an ``lr`` of 0.01, no weight decay
    and no ``grad_clip``.

    Attributes:
        name: ``adafactor`` needs ``zero_stage: 0`` and ``tensor: 1``.
        lr: peak learning rate; Adafactor's is relative to each parameter's scale; above 0.
        betas: AdamW's decay rates of the first and second moment; in [0, 1).
        eps: AdamW's epsilon; above 0.
        weight_decay: decoupled weight decay of matrices; 0 or more.
        grad_clip: largest norm of the whole gradient, 0 for no clipping; 0 or more.
        one_pass: AdamW's step under ZeRO 1 to 3 is one pass over each rank's partition; false
            leaves it to DeepSpeed, with the same result but for the rounding of the gradient norm.
        schedule: the learning rate over steps.
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
