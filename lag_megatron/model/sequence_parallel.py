"""Gradients of parameters that see a part of the sequence on each tensor-parallel rank.

Megatron-Core sums them in its own data-parallel wrapper, after the backward pass.  DeepSpeed's
engine has no such place, so here each is summed as soon as it exists, before DeepSpeed sees it.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def sum_partial_gradients(model: torch.nn.Module) -> None:
    """Sum, in every backward pass, the gradients of what is marked ``sequence_parallel``.

    These are the norms, and the biases that are added after tensor parallelism's sum (Korthikanti
    et al. 2022, section 4.2.2).
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            # Runs before the gradient is accumulated, and so before any hook of DeepSpeed's.
            parameter.register_hook(summed)
