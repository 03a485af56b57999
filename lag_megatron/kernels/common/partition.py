"""The state that an optimizer step updates on one rank, and its hyper-parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rates:
    """AdamW's hyper-parameters of one step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class Partition:
    """What a rank updates, all of one length n on one device.

    Attributes:
        master: fp32 weights.
        exp_avg: fp32 first moment.
        exp_avg_sq: fp32 second moment.
        step: fp32 scalar, updates made so far.
        weights: the weights that the model computes with, in its own type.
        gradients: parts whose elements one after the other are the gradient of ``master``; what is
            missing at the end is padding, whose gradient is 0.
    """

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    weights: Tensor
    gradients: Sequence[Tensor]
