"""The softmax and the gradient of a cross-entropy in place of its logits.

Two kernels that read logits in their own type, in Triton on CUDA and in C++ on a CPU; else torch.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from lag_megatron.kernels.common.build import builds_for_cpu


def row_statistics(
    logits: Tensor, place: Tensor, is_mine: Tensor, *, with_sum: bool = True
) -> tuple[Tensor, Tensor]:
    """The sums over each row of logits from which its cross-entropy follows.

    Args:
        logits: (n, v), in any floating type; may be overwritten with values that only
            :func:`logits_to_gradient` can read.
        place: int64 (n,), a column of each row's.
        is_mine: bool (n,), whether the label of a row is in these columns.
        with_sum: whether the sum of the logits is needed; otherwise it is undefined.

    Returns:
        The largest logit (n,), and (3, n): with that subtracted, the logit at ``place`` or 0, the
        sum of the logits, and the sum of their exponentials; fp32, or the logits' type if wider.
    """
    if has_kernel(logits.dtype, logits.device):
        if logits.is_cuda:
            from lag_megatron.kernels.triton.softmax_triton import statistics_triton as kernel
        else:
            from lag_megatron.kernels.cpu.softmax_cpu import statistics_cpu as kernel
        return kernel(logits, place, is_mine)
    top = logits.amax(dim=1)
    logits -= top[:, None]
    label = logits.gather(1, place[:, None])[:, 0].masked_fill_(~is_mine, 0.0)
    total = logits.sum(dim=1) if with_sum else label
    return top, torch.stack([label, total, logits.exp_().sum(dim=1)])


def logits_to_gradient(
    logits: Tensor, top: Tensor, factor: Tensor, even: Tensor, place: Tensor, taken: Tensor
) -> None:
    """Replace what :func:`row_statistics` left by the gradient of the logits, in place.

    It is exp(logit - top) factor - even, and ``taken`` more at ``place``.

    Args:
        logits: (n, v), changed.
        top: (n,), as ``row_statistics`` gave it.
        factor: (n,); so are ``even`` and ``taken``.
        place: int64 (n,).
    """
    if has_kernel(logits.dtype, logits.device):
        if logits.is_cuda:
            from lag_megatron.kernels.triton.softmax_triton import to_gradient_triton as kernel
        else:
            from lag_megatron.kernels.cpu.softmax_cpu import to_gradient_cpu as kernel
        kernel(logits, top, factor, even, place, taken)
        return
    logits *= factor[:, None]
    if bool(even.any()):
        logits -= even[:, None]
    logits.scatter_add_(1, place[:, None], taken[:, None])


def has_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel takes logits of this type; others have to be made fp32 or wider."""
    if device.type == "cuda":
        return dtype is not torch.float64 and _has_triton()
    return dtype in (torch.float32, torch.bfloat16) and builds_for_cpu()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
