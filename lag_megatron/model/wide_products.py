"""Products of bf16 matrices on a CPU without instructions for them.

There torch multiplies element by element, 9 to 60 times slower than in fp32 (AVX2, torch 2.13).
fp32 holds bf16 exactly, so the operands are widened, and the product is rounded once: what hardware
with such instructions does too.  By what the CPU can do and not by a trial, since a run has to go
on with the same numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


def emulates_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device multiplies matrices of this type without instructions for it."""
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return False
    mkldnn = torch.backends.mkldnn.is_available()
    return not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widen_products(model: torch.nn.Module) -> None:
    """Have a model's linear layers multiply in fp32, and round the product to what they gave."""
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            vars(module)["_forward_impl"] = _widened(module._forward_impl)
        elif isinstance(module, torch.nn.Linear):
            vars(module)["forward"] = _widened(_Linear(module))


class _Linear:
    """A torch layer's product, whose weights may be replaced under it."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._layer = layer

    def __call__(self, input: Tensor) -> Tensor:
        layer = self._layer
        bias = None if layer.bias is None else layer.bias.float()
        return F.linear(input, layer.weight.float(), bias)


def _widened(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def widened(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wide = [_float(value) for value in args]
        named = {key: _float(value) for key, value in kwargs.items()}
        return product(input.float(), *wide, **named).to(input.dtype)

    return widened


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
