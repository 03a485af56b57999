"""Matmuls in bf16 on a CPU without instructions for them.

There torch multiplies element by element, 9 to 60 times slower than in fp32 (AVX2, torch 2.13).
fp32 holds bf16 exactly, so the operands are widened, and the product is rounded once: what hardware
with such instructions does too.  By what the CPU can do and not by a trial, since a run has to go
on with the same numbers.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def needs_bf16_emulation(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device lacks matmul instructions for this type."""
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return False
    mkldnn = torch.backends.mkldnn.is_available()
    return not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def emulate_bf16_matmuls(model: torch.nn.Module) -> None:
    """Make a model's linear layers multiply in fp32 and round the product to their own type."""
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            vars(module)["_forward_impl"] = _widened(module._forward_impl)
        elif isinstance(module, torch.nn.Linear):
            vars(module)["forward"] = functools.partial(_of_layer, module, _widened(F.linear))


def _of_layer(layer: torch.nn.Linear, product: Callable[..., Tensor], input: Tensor) -> Tensor:
    return product(input, layer.weight, layer.bias)  # looked up anew: they may be replaced


def _widened(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def widened(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copies = _Copies()
        wide = [copies.widen(value) for value in (input, *args)]
        named = {key: copies.widen(value) for key, value in kwargs.items()}
        with saved_tensors_hooks(copies.keep, _widened_again):
            return product(*wide, **named).to(input.dtype)

    return widened


class _Copies:
    """fp32 copies for one product; none are saved for backward, which makes them again."""

    def __init__(self) -> None:
        self._sources: dict[int, Tensor] = {}  # by the address of the copy

    def widen(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        wide = value.float()
        if wide is not value:
            self._sources[wide.data_ptr()] = value
        return wide

    def keep(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """What backward holds, and of what was widened the layout that it had."""
        source = self._sources.get(tensor.data_ptr())
        if source is None or source.numel() != tensor.numel() or not tensor.numel():
            return tensor, None
        return source, (tensor.shape, tensor.stride())


def _widened_again(kept: tuple[Tensor, Any]) -> Tensor:
    tensor, layout = kept
    # Of a parameter, what it holds now: ZeRO-3 has gathered it for backward.
    return tensor if layout is None else tensor.detach().float().as_strided(*layout)
