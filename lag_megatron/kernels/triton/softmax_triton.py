"""The softmax and the gradient of a cross-entropy in Triton; a program takes one row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lag_megatron.kernels.triton.rounding import to_bf16

_BLOCK = 4096


def statistics_triton(logits: Tensor, place: Tensor, is_mine: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`lag_megatron.kernels.softmax.row_statistics`; the logits stay as they are."""
    rows, columns = logits.shape
    found = torch.empty((4, rows), dtype=torch.float32, device=logits.device)
    if rows:
        _statistics[(rows,)](
            logits, place, is_mine, found, columns, logits.stride(0), rows, BLOCK=_block(columns)
        )
    return found[0], found[1:]


def to_gradient_triton(
    logits: Tensor, top: Tensor, factor: Tensor, even: Tensor, place: Tensor, taken: Tensor
) -> None:
    """As :func:`lag_megatron.kernels.softmax.logits_to_gradient`."""
    rows, columns = logits.shape
    if rows:
        numbers = torch.stack([top, factor, even, taken]).float()
        block = _block(columns)
        grid = (rows, triton.cdiv(columns, block))
        _gradient[grid](logits, place, numbers, columns, logits.stride(0), rows, BLOCK=block)


def _block(columns: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(columns))


@triton.jit
def _statistics(logits, place, is_mine, found, columns, stride, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    exponentials = tl.zeros((), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        here = start + lane < columns
        values = tl.load(logits + row * stride + start + lane, here, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(values, 0))
        exponentials = exponentials * tl.exp(top - higher) + tl.sum(tl.exp(values - higher), 0)
        total += tl.sum(tl.where(here, values, 0.0), 0)
        top = higher
    label = tl.load(logits + row * stride + tl.load(place + row)).to(tl.float32)
    label = tl.where(tl.load(is_mine + row) != 0, label - top, 0.0)
    tl.store(found + row, top)
    tl.store(found + rows + row, label)
    tl.store(found + 2 * rows + row, total - columns * top)
    tl.store(found + 3 * rows + row, exponentials)


@triton.jit
def _gradient(logits, place, numbers, columns, stride, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    top = tl.load(numbers + row)
    factor = tl.load(numbers + rows + row)
    even = tl.load(numbers + 2 * rows + row)
    taken = tl.load(numbers + 3 * rows + row)
    address = logits + row * stride + column
    values = tl.exp(tl.load(address, here, float("-inf")).to(tl.float32) - top) * factor - even
    values += tl.where(column == tl.load(place + row), taken, 0.0)
    if logits.dtype.element_ty == tl.bfloat16:
        values = to_bf16(values)
    tl.store(address, values.to(logits.dtype.element_ty), here)
