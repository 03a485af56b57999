"""Writing a grown state in Triton, for CUDA; the interpreter runs it on a CPU in tests."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lag_megatron.kernels.common.runs import TILE
from lag_megatron.kernels.triton.rounding import to_bf16

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def grow_triton(rows: Tensor, scales: Tensor, kind: torch.dtype) -> None:
    """Write the runs of a table with one launch on the current stream.

    Args:
        rows: int64 (n, 5) on the device, from
            :func:`lag_megatron.kernels.common.runs.run_table`.
        scales: fp32 (n,) on the device.
        kind: type of the weights.
    """
    _grow[(len(rows),)](rows, scales, KIND=_TYPES[kind], BLOCK=TILE, num_warps=8)


@triton.jit
def _grow(rows, scales, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = rows + 5 * tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + tl.program_id(0))
    target, source, weights = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    length, flags = tl.load(row + 3), tl.load(row + 4)
    # A promise of alignment stays with the operation that made a value, whoever uses it: each
    # branch makes its own, or the second would be compiled by the promises of the first.
    if flags % 2 == 1:  # loads and stores of four elements each
        _write(
            tl.multiple_of(target.to(tl.pointer_type(tl.float32)), 16),
            tl.multiple_of(source.to(tl.pointer_type(tl.float32)), 16),
            tl.multiple_of(weights.to(tl.pointer_type(KIND)), 8),
            length // 4 * 4,
            source,
            weights,
            flags,
            scale,
            KIND,
            BLOCK,
        )
    else:
        _write(
            target.to(tl.pointer_type(tl.float32)),
            source.to(tl.pointer_type(tl.float32)),
            weights.to(tl.pointer_type(KIND)),
            length,
            source,
            weights,
            flags,
            scale,
            KIND,
            BLOCK,
        )


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    target_of,
    source_of,
    weights_of,
    length,
    source,
    weights,
    flags,
    scale,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.arange(0, BLOCK)
    here = place < length
    value = tl.zeros((BLOCK,), tl.float32) + scale
    if source != 0:
        value = tl.load(source_of + place, here, 0.0) * scale
    if flags < 2:
        tl.store(target_of + place, value, here)
    if weights != 0:
        if tl.bfloat16 == KIND:
            value = to_bf16(value)
        tl.store(weights_of + place, value.to(KIND), here)
