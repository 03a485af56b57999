"""Attention by plain products on a CPU: batched products of torch's, the softmax between in C++."""

from ctypes import c_float, c_long
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lag_megatron.kernels.common.build import builds_for_cpu, data_pointer, load_library

SOURCE = Path(__file__).with_name("attention_cpu.cpp")


def one_pass_softmax(query: Tensor) -> bool:
    """Whether :func:`attend_cpu` takes these."""
    known = query.dtype in (torch.float32, torch.bfloat16)
    return query.device.type == "cpu" and known and builds_for_cpu()


def attend_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """Two batched products, and four in backward; scores become weights where they lie.

    Args:
        query: (b, h, s, k) in fp32 or bf16.
        key: (b, g, t, k), and so is ``value``; h is a multiple of g.
        hidden: bool, broadcast to (b, h, s, t); None hides nothing.
        causal: whether what comes after a position is hidden from it as well.
        scale: of the scores.

    Returns:
        (b, h, s, k).

    Raises:
        LagError: if the kernel cannot be built.
    """
    out: Tensor = _Attend.apply(query, key, value, hidden, causal, scale)
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        batch, heads, length, size = query.shape
        # oneDNN copies what is not dense, and transposes while it does: far slower than this.
        # The query heads of a group lie one below the other, so that none of its keys is repeated.
        groups, columns = key.shape[1:3]
        query = query.reshape(batch * groups, heads // groups * length, size).contiguous()
        key, value = (t.reshape(batch * groups, columns, size).contiguous() for t in (key, value))
        weights = query @ key.transpose(1, 2)
        if weights.numel():
            load_library(SOURCE).lag_attention_softmax(
                *_typed(weights),
                *map(c_long, (heads, length, columns, batch * heads * length)),
                *_mask(hidden, (batch, heads, length, columns)),
                causal,
                c_float(scale),
                torch.get_num_threads(),
            )
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.of_keys = scale, (batch, groups, columns, size)
        return (weights @ value).view(batch, heads, length, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, weights = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(query.shape).contiguous()
        of_value = weights.transpose(1, 2) @ grad
        of_scores = grad @ value.transpose(1, 2)
        if weights.numel():
            load_library(SOURCE).lag_attention_softmax_back(
                data_pointer(weights),
                *_typed(of_scores),
                *map(c_long, (weights.shape[-1], weights.numel() // weights.shape[-1])),
                c_float(ctx.scale),
                torch.get_num_threads(),
            )
        of_query, of_key = of_scores @ key, of_scores.transpose(1, 2) @ query
        of_keys = [t.view(ctx.of_keys) for t in (of_key, of_value)]
        return of_query.view(shape), *of_keys, None, None, None


def _typed(tensor: Tensor) -> tuple[Any, bool]:
    """Address, and whether bf16."""
    return data_pointer(tensor), tensor.dtype is torch.bfloat16


def _mask(hidden: Tensor | None, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Address and strides of a mask."""
    if hidden is None:
        return data_pointer(None), *map(c_long, (0, 0, 0, 0))
    whole = hidden.expand(shape)
    return data_pointer(whole), *map(c_long, whole.stride())
