"""The softmax and the gradient of a cross-entropy in place of its logits.

On CUDA two kernels in Triton, which read logits in their own type; elsewhere torch.
"""

import importlib.util

import torch
from torch import Tensor


def statistics(
    logits: Tensor, place: Tensor, is_mine: Tensor, *, with_sum: bool = True
) -> tuple[Tensor, Tensor]:
    """What the loss needs of each row.

    Args:
        logits: (n, v), in any floating type; what they hold afterwards only ``to_gradient`` knows.
        place: int64 (n,), a column of each row's.
        is_mine: bool (n,), whether the label of a row is in these columns.
        with_sum: whether the sum of the logits is wanted; else it is anything.

    Returns:
        The largest logit (n,), and (3, n): with that subtracted, the logit at ``place`` or 0, the
        sum of the logits, and the sum of their exponentials; fp32, or the logits' type if wider.
    """
    if _by_triton(logits):
        from lag_megatron.kernels.softmax_triton import statistics_triton

        return statistics_triton(logits, place, is_mine)
    top = logits.amax(dim=1)
    logits -= top[:, None]
    label = logits.gather(1, place[:, None])[:, 0].masked_fill_(~is_mine, 0.0)
    total = logits.sum(dim=1) if with_sum else label
    return top, torch.stack([label, total, logits.exp_().sum(dim=1)])


def to_gradient(
    logits: Tensor, top: Tensor, factor: Tensor, even: Tensor, place: Tensor, taken: Tensor
) -> None:
    """Make of what ``statistics`` left: exp(logit - top) factor - even, and at ``place`` + taken.

    Args:
        logits: (n, v), changed.
        top: (n,), as ``statistics`` gave it.
        factor: (n,); so are ``even`` and ``taken``.
        place: int64 (n,).
    """
    if _by_triton(logits):
        from lag_megatron.kernels.softmax_triton import to_gradient_triton

        to_gradient_triton(logits, top, factor, even, place, taken)
        return
    logits *= factor[:, None]
    if bool(even.any()):
        logits -= even[:, None]
    logits.scatter_add_(1, place[:, None], taken[:, None])


def reads_any_type(device: torch.device) -> bool:
    """Whether logits may stay in 16 bits; elsewhere they have to be fp32 or wider."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _by_triton(logits: Tensor) -> bool:
    return reads_any_type(logits.device) and logits.dtype is not torch.float64
