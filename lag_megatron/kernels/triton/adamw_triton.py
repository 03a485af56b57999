"""The one-pass AdamW in Triton, for CUDA; the interpreter runs it on a CPU in tests."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lag_megatron.kernels.common.partition import Rates
from lag_megatron.kernels.triton.rounding import to_bf16

_BLOCK = 1024


def adamw_triton(
    state: Sequence[Tensor], gradient: Tensor, weights: Tensor, numbers: Tensor, rates: Rates
) -> None:
    """Launch the update on the current stream.

    Args:
        state: fp32 master, first and second moment, (n,) each.
        gradient: flat, fp32 or bf16; elements missing at the end count as 0.
        weights: (n,), fp32 or bf16.
        numbers: fp32 (3,): the gradient's scale, step size, square root of the second correction.
        rates: of this step.
    """
    length = state[0].numel()
    _adamw[(triton.cdiv(length, _BLOCK),)](
        *state,
        gradient,
        weights,
        numbers,
        length,
        gradient.numel(),
        rates.lr * rates.weight_decay,
        *rates.betas,
        rates.eps,
        BLOCK=_BLOCK,
    )


@triton.jit
def _adamw(  # type: ignore[no-untyped-def]
    master_of,
    exp_avg_of,
    exp_avg_sq_of,
    gradient_of,
    weights_of,
    numbers,
    length,
    gradient_length,
    decay,
    beta1,
    beta2,
    eps,
    BLOCK: tl.constexpr,
):
    scale = tl.load(numbers)
    step_size = tl.load(numbers + 1)
    correction = tl.load(numbers + 2)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    finite = tl.abs(scale + tl.zeros((BLOCK,), tl.float32)) < float("inf")  # false of NaN too
    here = (place < length) & finite
    gradient = tl.load(gradient_of + place, here & (place < gradient_length), 0.0).to(tl.float32)
    gradient *= tl.where(finite, scale, 0.0)
    master = tl.load(master_of + place, here, 0.0)
    exp_avg = tl.load(exp_avg_of + place, here, 0.0)
    exp_avg_sq = tl.load(exp_avg_sq_of + place, here, 0.0)
    exp_avg = beta1 * exp_avg + (1.0 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * gradient * gradient
    master -= decay * master
    master -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) / correction + eps)
    tl.store(master_of + place, master, here)
    tl.store(exp_avg_of + place, exp_avg, here)
    tl.store(exp_avg_sq_of + place, exp_avg_sq, here)
    if weights_of.dtype.element_ty == tl.bfloat16:
        master = to_bf16(master)
    tl.store(weights_of + place, master.to(weights_of.dtype.element_ty), here)
