"""Sums over ranks that stay on the device, so that the host need not wait for them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lag_megatron.distributed.world import World
from lag_megatron.model.parameter_groups import gradient_squares


def float64_tensor(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers in double precision on a device; a copy to a GPU is not waited for."""
    made = torch.tensor(values, dtype=torch.float64)
    if device.type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    return made


def sum_over_data_parallel(values: Tensor, world: World) -> Tensor:
    """Elementwise sum over the data-parallel replicas, in place of ``values``."""
    dist.all_reduce(values, group=world.data_group)
    return values


def gradient_norm(model: torch.nn.Module) -> Tensor:
    """L2 norm of the gradients that a model's parameters hold, over all tensor-parallel ranks."""
    whole, cut = gradient_squares(model)
    dist.all_reduce(cut, group=parallel_state.get_tensor_model_parallel_group())
    return (whole + cut).sqrt()


def to_host(*tensors: Tensor) -> list[list[float]]:
    """The numbers of each tensor, brought to the host by one transfer."""
    flat = torch.cat([tensor.double().view(-1) for tensor in tensors])
    return [part.tolist() for part in flat.cpu().split([t.numel() for t in tensors])]
