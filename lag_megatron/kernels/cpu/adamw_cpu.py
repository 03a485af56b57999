"""The one-pass AdamW and the norm before it on a CPU, in C++."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.errors import LagError
from lag_megatron.kernels.common.build import data_pointer, load_library
from lag_megatron.kernels.common.partition import Partition, Rates

SOURCE = Path(__file__).with_name("adamw_cpu.cpp")


def adamw_cpu(partition: Partition, rates: Rates, scale: float) -> None:
    """As :func:`lag_megatron.kernels.adamw.adamw_step`, of a finite scale.

    Raises:
        LagError: if the kernel cannot be built, or there are more gradients than masters.
    """
    partition.step.add_(1)
    step = float(partition.step)
    corrections = [1.0 - beta**step for beta in rates.betas]
    weights, parts = partition.weights, _plain(partition.gradients)
    missing = partition.master.numel() - sum(part.numel() for part in parts)
    if missing < 0:
        raise LagError(
            f"the gradients have {-missing} elements more than the {partition.master.numel()} of "
            "their partition: this version of DeepSpeed cuts them in a way that is not understood "
            "here. Set optimizer.one_pass: false."
        )
    if missing:
        parts.append(torch.zeros(missing, dtype=parts[0].dtype if parts else torch.float32))
    beta1, beta2 = rates.betas
    numbers = (
        *(scale, rates.lr / corrections[0], corrections[1] ** 0.5),
        *(1.0 - rates.lr * rates.weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, rates.eps),
    )
    load_library(SOURCE).lag_adamw(
        *map(data_pointer, (partition.master, partition.exp_avg, partition.exp_avg_sq, weights)),
        weights.dtype is torch.bfloat16,
        *_table(parts),
        *map(ctypes.c_float, numbers),
        torch.get_num_threads(),
    )


def squares_cpu(tensors: Sequence[Tensor]) -> float:
    """Sum of the squares of all elements.

    Raises:
        LagError: if the kernel cannot be built.
    """
    sum_of, parts = load_library(SOURCE).lag_squares, _plain(tensors)
    sum_of.restype = ctypes.c_double
    return float(sum_of(*_table(parts), torch.get_num_threads()))


def _plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as the kernel reads them: contiguous, and all fp32 or all bf16."""
    kinds = {tensor.dtype for tensor in tensors}
    kind = torch.bfloat16 if kinds == {torch.bfloat16} else torch.float32
    return [tensor.to(kind).contiguous() for tensor in tensors]


def _table(parts: Sequence[Tensor]) -> tuple[Any, Any, int, bool]:
    """Addresses, lengths, number and whether bf16."""
    addresses = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
    lengths = (ctypes.c_long * len(parts))(*(part.numel() for part in parts))
    return addresses, lengths, len(parts), bool(parts) and parts[0].dtype is torch.bfloat16
