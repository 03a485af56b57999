"""An activation with the bias before it, and with the product after it where it gates, in one pass.

On a CPU a kernel in C++.  ``tools/bench/training/elementwise.py`` measures it against torch's
operations, plain and compiled, and its committed table decides.
"""

from ctypes import c_long
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lag_megatron.kernels.common.build import builds_for_cpu, data_pointer, load_library

SOURCE = Path(__file__).with_name("activation_cpu.cpp")
KINDS = {"gelu": 0, "gelu_exact": 1, "swiglu": 2}


def one_pass_wins(hidden: Tensor, kind: str) -> bool:
    """Whether the kernel is the faster form for these.

    By the table under tools/bench/results and not by a trial, since a run has to go on with the
    same numbers.  No GPU is in it, so that there torch's operations stay.
    """
    dtypes = [torch.float32] if kind == "gelu_exact" else [torch.float32, torch.bfloat16]
    return hidden.device.type == "cpu" and hidden.dtype in dtypes and builds_for_cpu()


def activate(hidden: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """One pass over ``hidden``, rounded once to its type.

    Args:
        hidden: (..., n) on a CPU, in fp32 or bf16; for ``swiglu`` (..., 2 n), first what goes
            through the sigmoid (Shazeer 2020, arXiv 2002.05202, equation 5).
        bias: as long as ``hidden``'s last dimension, of its type, or None.
        kind: ``gelu`` by tanh or ``gelu_exact`` (Hendrycks and Gimpel 2016, arXiv 1606.08415,
            section 2), or ``swiglu``.

    Returns:
        (..., n).

    Raises:
        LagError: if the kernel cannot be built.
    """
    out: Tensor = _OnePass.apply(hidden, bias, kind)
    return out


def activate_by_torch(hidden: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The same by torch's operations, each of them rounded."""
    if bias is not None:
        hidden = hidden + bias
    if kind != "swiglu":
        return F.gelu(hidden, approximate="tanh" if kind == "gelu" else "none")
    gate, linear = hidden.chunk(2, dim=-1)
    return F.silu(gate) * linear


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        hidden = hidden.contiguous()
        bias = None if bias is None else bias.contiguous()
        width = hidden.shape[-1] // (2 if kind == "swiglu" else 1)
        out = hidden.new_empty((*hidden.shape[:-1], width))
        if out.numel():
            load_library(SOURCE).lag_activation(
                KINDS[kind], _is_bf16(hidden), *map(data_pointer, (hidden, bias, out)), *_sizes(out)
            )
        ctx.save_for_backward(hidden, bias)
        ctx.kind = kind
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        hidden, bias = ctx.saved_tensors
        grad, of_hidden = grad.contiguous(), torch.empty_like(hidden)
        summed = bias is not None and ctx.needs_input_grad[1]
        of_bias = torch.zeros(hidden.shape[-1]) if summed else None
        if grad.numel():
            load_library(SOURCE).lag_activation_back(
                KINDS[ctx.kind],
                _is_bf16(hidden),
                *map(data_pointer, (grad, hidden, bias, of_hidden, of_bias)),
                *_sizes(grad),
            )
        return of_hidden, None if of_bias is None else of_bias.to(hidden.dtype), None


def _is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bfloat16


def _sizes(out: Tensor) -> tuple[Any, ...]:
    """Rows and columns of what the activation gives, and how many threads may share them."""
    columns = out.shape[-1]
    return c_long(out.numel() // columns), c_long(columns), torch.get_num_threads()
