"""The softmax and the gradient of a cross-entropy on a CPU, in C++."""

from ctypes import c_long
from pathlib import Path

import torch
from torch import Tensor

from lag_megatron.kernels.common.build import data_pointer, load_library

SOURCE = Path(__file__).with_name("softmax_cpu.cpp")


def statistics_cpu(logits: Tensor, place: Tensor, is_mine: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`lag_megatron.kernels.softmax.row_statistics`; the logits stay as they are."""
    found = torch.empty((4, len(logits)), dtype=torch.float32)
    place, is_mine = place.contiguous(), is_mine.contiguous()
    if logits.numel():
        load_library(SOURCE).lag_softmax_statistics(
            *_matrix(logits), *map(data_pointer, (place, is_mine, found)), torch.get_num_threads()
        )
    return found[0], found[1:]


def to_gradient_cpu(
    logits: Tensor, top: Tensor, factor: Tensor, even: Tensor, place: Tensor, taken: Tensor
) -> None:
    """As :func:`lag_megatron.kernels.softmax.logits_to_gradient`."""
    numbers = torch.stack([top, factor, even, taken]).float()
    place = place.contiguous()
    if logits.numel():
        load_library(SOURCE).lag_softmax_gradient(
            *_matrix(logits), data_pointer(place), data_pointer(numbers), torch.get_num_threads()
        )


def _matrix(logits: Tensor) -> tuple[object, ...]:
    """Address, whether bf16, elements between rows, rows and columns."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    is_bf16 = logits.dtype is torch.bfloat16
    return data_pointer(logits), is_bf16, *map(c_long, (logits.stride(0), *logits.shape))
