"""The one-pass AdamW in CUDA C++, for machines without Triton."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lag_megatron.errors import LagError
from lag_megatron.kernels.common.build import load_library
from lag_megatron.kernels.common.partition import Rates

SOURCE = Path(__file__).with_name("adamw_cuda.cu")


def adamw_cuda(
    state: Sequence[Tensor], gradient: Tensor, weights: Tensor, numbers: Tensor, rates: Rates
) -> None:
    """Launch the update on the current stream.

    Args:
        state: fp32 master, first and second moment.
        gradient: flat, fp32 or bf16; what it lacks at the end is 0.
        weights: flat, fp32 or bf16.
        numbers: fp32 (3,): the gradient's scale, step size, second correction.
        rates: of this step.

    Raises:
        LagError: if the kernel cannot be built or launched.
    """
    error = load_library(SOURCE).lag_adamw(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in state),
        ctypes.c_void_p(gradient.data_ptr()),
        gradient.dtype is torch.bfloat16,
        ctypes.c_void_p(weights.data_ptr()),
        weights.dtype is torch.bfloat16,
        ctypes.c_void_p(numbers.data_ptr()),
        ctypes.c_long(state[0].numel()),
        ctypes.c_long(gradient.numel()),
        *map(ctypes.c_float, (rates.lr * rates.weight_decay, *rates.betas, rates.eps)),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    if error:
        raise LagError(f"the CUDA kernel of AdamW could not be launched: CUDA error {error}.")
