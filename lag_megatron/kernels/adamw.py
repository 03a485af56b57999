"""AdamW over one flat partition in one pass: clip, moments, fp32 master, the model's weights.

Loshchilov and Hutter 2019 (arXiv 1711.05101, algorithm 2).  DeepSpeed makes five passes: it
concatenates, casts, clips and applies gradients, and casts the masters back.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lag_megatron.kernels.common.partition import Partition, Rates
from lag_megatron.kernels.cpu.adamw_cpu import adamw_cpu, squares_cpu


def adamw_step(partition: Partition, rates: Rates, scale: Tensor) -> None:
    """Update a partition in place; a scale that is not finite leaves it as it is.

    Args:
        partition: is changed, but for its gradients.
        rates: of this step.
        scale: fp32 scalar on the same device, by which gradients are multiplied first.

    Raises:
        LagError: if this device's kernel cannot be built.
    """
    if partition.master.device.type == "cuda":
        adamw_on_gpu(partition, rates, scale)
    elif bool(scale.isfinite()):
        adamw_cpu(partition, rates, float(scale))


def adamw_on_gpu(partition: Partition, rates: Rates, scale: Tensor, *, by: str = "") -> None:
    """As :func:`adamw_step` on a GPU with the kernel ``triton`` or ``cuda``; it is asynchronous.

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
        from lag_megatron.kernels.triton.adamw_triton import adamw_triton

        return adamw_triton
    from lag_megatron.kernels.cuda.adamw_cuda import adamw_cuda

    return adamw_cuda


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, an fp32 scalar where the tensors are; 0 of nothing."""
    if not tensors:
        return torch.zeros(())
    if not tensors[0].is_cuda:
        return torch.tensor(squares_cpu(tensors), dtype=torch.float32)
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()
