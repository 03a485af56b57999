"""Writing a grown state in CUDA C++, for machines without Triton."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from lag_megatron.errors import LagError
from lag_megatron.kernels.common.build import load_library

SOURCE = Path(__file__).with_name("grow_cuda.cu")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def grow_cuda(rows: Tensor, scales: Tensor, kind: torch.dtype) -> None:
    """Launch the writing on the current stream.

    Args:
        rows: int64 (n, 5) on the device, from
            :func:`lag_megatron.kernels.common.runs.run_table`.
        scales: fp32 (n,) on the device.
        kind: type of the weights.

    Raises:
        LagError: if the kernel cannot be built or launched.
    """
    error = load_library(SOURCE).lag_grow(
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_void_p(scales.data_ptr()),
        ctypes.c_long(len(rows)),
        _KINDS[kind],
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    if error:
        raise LagError(f"the CUDA kernel of growth could not be launched: CUDA error {error}.")
