"""DeepSpeed's optimizer step under ZeRO 1 to 3, with its passes over a partition fused into one.

DeepSpeed's own step joins, casts, unscales and clips gradients, updates masters and moments, and
casts the masters to weights, each in a pass over memory.  Here one kernel does all that.  What
DeepSpeed does around it (bookkeeping of buffers, the gathering of weights) is done by its own code.
"""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from lag_megatron.engine.deepspeed_adapter import PartitionedAdapter
from lag_megatron.engine.deepspeed_adapter.partitioned import ZeroPartition
from lag_megatron.kernels.adamw import adamw_step, squared_norms
from lag_megatron.kernels.common.partition import Partition, Rates


def use_fused_step(zero: PartitionedAdapter) -> None:
    """Replace the step of DeepSpeed's ZeRO optimizer around torch's AdamW.

    Gradients whose norm is not finite change nothing, and that norm is reported.
    """
    zero.replace_step(functools.partial(_step, zero))
    zero.skip_reduction_without_replicas()


@torch.no_grad()
def _step(zero: PartitionedAdapter, closure: None = None) -> None:
    zero.begin_step()
    scale = _clip(zero)
    zero.drop_unneeded_gradients()
    for number in range(len(zero.masters)):
        _update(zero.torch_optimizer, zero.partition(number), scale)
        zero.finish_partition(number)
    zero.finish_step()


def _clip(zero: PartitionedAdapter) -> Tensor:
    """What gradients are multiplied by; reports their norm before clipping.

    A parameter that tensor-parallel ranks hold whole counts on the first of them alone.
    """
    first = zero.is_first_tensor_rank
    counted = [
        gradient
        for gradient, parameter in zero.gradients()
        if first or getattr(parameter, "tensor_model_parallel", False)
    ]
    square = squared_norms(counted).to(zero.device)
    zero.sum_over_ranks(square)
    norm = square.sqrt()
    zero.set_grad_norm(norm)
    scale = torch.ones_like(norm)
    if zero.max_grad_norm > 0:
        scale = 1.0 / torch.clamp((norm + 1e-6) / zero.max_grad_norm, min=1.0)
    return torch.where(norm.isfinite(), scale, torch.nan)


def _update(optimizer: torch.optim.Optimizer, zero: ZeroPartition, scale: Tensor) -> None:
    """Update one partition; hooks on the step of torch's optimizer are called as by its own."""
    options, state = optimizer.param_groups[zero.group], optimizer.state[zero.master]
    if not state:  # as torch's own makes it at the first step
        state["step"] = torch.zeros((), device=zero.master.device)
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(zero.master) for _ in range(2))
    partition = Partition(
        master=zero.master.data,
        exp_avg=state["exp_avg"],
        exp_avg_sq=state["exp_avg_sq"],
        step=state["step"],
        weights=zero.weights,
        gradients=zero.gradients,
    )
    rates = Rates(options["lr"], options["betas"], options["eps"], options["weight_decay"])
    stepped = SimpleNamespace(param_groups=[{"params": [zero.master]}])
    for hook in optimizer._optimizer_step_pre_hooks.values():
        hook(stepped, (), {})
    adamw_step(partition, rates, scale)
    for hook in optimizer._optimizer_step_post_hooks.values():
        hook(stepped, (), {})
        partition.weights.copy_(partition.master)
