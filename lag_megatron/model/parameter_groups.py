"""The optimizer, with weight decay for matrices alone."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lag_megatron.config import OptimizerConfig
from lag_megatron.model.adafactor import Adafactor

ShapeOf = Callable[[Tensor], Sequence[int]]


def split_by_decay(
    model: torch.nn.Module, *, shape_of: ShapeOf = attrgetter("shape")
) -> tuple[list[Any], list[Any]]:
    """Matrices, which decay, and vectors (biases and norms), which do not.

    ``shape_of`` gives the whole shape of a parameter of which a rank holds a part.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if len(shape_of(p)) > 1]
    others = [p for p in trained if len(shape_of(p)) <= 1]
    return decayed, others


def make_optimizer(
    model: torch.nn.Module, options: OptimizerConfig, *, shape_of: ShapeOf = attrgetter("shape")
) -> torch.optim.Optimizer:
    """The optimizer, which decays matrices alone; its learning rate is 0 until a step sets it.

    AdamW is torch's fused one, a single pass over the partition on a CPU too; Adafactor has none.
    See :func:`split_by_decay` for ``shape_of``.
    """
    decayed, others = split_by_decay(model, shape_of=shape_of)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.name == "adafactor":
        return Adafactor(groups, lr=0.0)
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )


def gradient_squares(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Sums of squared gradients of parameters that every tensor-parallel rank holds whole, and of
    this rank's parts of those that are cut, in double precision where the gradients are."""
    parameters = list(model.parameters())
    whole, cut = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
    for parameter in parameters:
        if parameter.grad is not None:
            is_cut = getattr(parameter, "tensor_model_parallel", False)
            (cut if is_cut else whole).add_(parameter.grad.detach().double().square().sum())
    return whole, cut
