"""AdamW over one flat partition in one pass: clip, moments, fp32 master, the model's weights.

Loshchilov and Hutter 2019 (arXiv 1711.05101, algorithm 2).  DeepSpeed makes five passes of it:
gradients are joined, cast, clipped, applied and the masters cast back.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of a chunk on a CPU: its gradient stays in the cache from the cast to the update.
_CHUNK = 1 << 17


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


def adamw_step(partition: Partition, rates: Rates, scale: Tensor) -> None:
    """Update a partition in place; a scale that is not finite leaves it as it is.

    Args:
        partition: is changed, but for its gradients.
        rates: of this step.
        scale: fp32 scalar on the same device, by which gradients are multiplied first.
    """
    if partition.master.device.type == "cuda":
        on_device(partition, rates, scale)
    else:
        _in_chunks(partition, rates, scale)


def on_device(partition: Partition, rates: Rates, scale: Tensor, *, by: str = "") -> None:
    """As :func:`adamw_step` with one kernel, ``triton`` or ``cuda``, without waiting for it.

    By default Triton's, where that is installed.
    """
    parts = [part.reshape(-1) for part in partition.gradients]
    gradient = parts[0] if len(parts) == 1 else torch.cat(parts)
    partition.step.add_(scale.isfinite())
    step = partition.step.double()
    corrections = [1.0 - beta**step for beta in rates.betas]
    numbers = torch.stack([scale.double(), rates.lr / corrections[0], corrections[1].sqrt()])
    state = (partition.master, partition.exp_avg, partition.exp_avg_sq)
    launch = _launcher(by or ("triton" if importlib.util.find_spec("triton") else "cuda"))
    launch(state, gradient, partition.weights, numbers.float(), rates)


def _launcher(by: str) -> Callable[..., None]:
    if by == "triton":
        from lag_megatron.kernels.adamw_triton import adamw_triton

        return adamw_triton
    from lag_megatron.kernels.adamw_cuda import adamw_cuda

    return adamw_cuda


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, an fp32 scalar; 0 of nothing."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()


def _in_chunks(partition: Partition, rates: Rates, scale: Tensor) -> None:
    if not bool(scale.isfinite()):
        return
    partition.step.add_(1)
    length = partition.master.numel()
    parts = [part.reshape(-1) for part in partition.gradients]
    buffer = torch.empty(min(length, _CHUNK), dtype=torch.float32)
    for start in range(0, length, _CHUNK):
        end = min(start + _CHUNK, length)
        gradient = buffer[: end - start]
        _join(parts, gradient)
        gradient.mul_(scale)
        here = slice(start, end)
        torch._fused_adamw_(
            [partition.master[here]],
            [gradient],
            [partition.exp_avg[here]],
            [partition.exp_avg_sq[here]],
            [],
            [partition.step],
            amsgrad=False,
            lr=rates.lr,
            beta1=rates.betas[0],
            beta2=rates.betas[1],
            weight_decay=rates.weight_decay,
            eps=rates.eps,
            maximize=False,
        )
        partition.weights[here].copy_(partition.master[here])


def _join(parts: list[Tensor], out: Tensor) -> None:
    """Fill ``out`` with the next elements of the parts, which are taken away from them."""
    filled = 0
    while parts and filled < out.numel():
        taken = min(parts[0].numel(), out.numel() - filled)
        out[filled : filled + taken].copy_(parts[0][:taken])
        filled += taken
        if taken == parts[0].numel():
            parts.pop(0)
        else:
            parts[0] = parts[0][taken:]
    out[filled:].zero_()
