"""DeepSpeed's optimizer step under ZeRO 1 to 3, with its passes over a partition made one.

The parts of DeepSpeed's own step that hold no arithmetic of the partition (bookkeeping of buffers,
the gathering of weights) are called as they are.
"""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lag_megatron.kernels.adamw import adamw_step, squared_norms
from lag_megatron.kernels.common.partition import Partition, Rates


def use_one_pass(zero: Any, *, stage: int) -> None:
    """Replace the step of DeepSpeed's ZeRO optimizer around torch's AdamW.

    Gradients whose norm is not finite change nothing, and that norm is reported.
    """
    zero.step = functools.partial(_step_3 if stage == 3 else _step_1_2, zero)
    # Where gradients add up in another type, only the reduction fills what is stepped on.
    kept = stage < 3 and zero.gradient_accumulation_dtype == zero.dtype
    if kept and dist.get_world_size(zero.dp_process_group) == 1:
        # Without a second replica the mean is the gradient itself. DeepSpeed copies it into a
        # bucket, widens, divides by one, narrows and copies it out: a seventh of a step on a CPU.
        zero.reduce_independent_p_g_buckets_and_remove_grads = _leave_where_it_is


def _leave_where_it_is(parameter: Tensor, group: int) -> None:
    """Instead of a reduction: the epilogue of DeepSpeed's backward finds the gradient there."""


@torch.no_grad()
def _step_1_2(zero: Any, closure: None = None) -> None:
    """As ``DeepSpeedZeroOptimizer.step`` without offloading."""
    zero.micro_step_id = -1
    groups = range(len(zero.bit16_groups))
    counted = [
        pair
        for i in groups
        for pair in zip(_real(zero, i), zero.params_in_partition[i], strict=False)
    ]
    scale = _clip(zero, counted)
    for i in groups:
        zero.free_grad_in_param_list(zero.params_not_in_partition[i])
        rank = dist.get_rank(zero.real_dp_process_group[i])
        weights = zero.parallel_partitioned_bit16_groups[i][rank]
        master = zero.single_partition_of_fp32_groups[i]
        _update(zero, i, master, weights, zero.averaged_gradients[i], scale)
        zero.free_grad_in_param_list(zero.params_in_partition[i])
        zero.averaged_gradients[i] = zero.all_grad_tensors[i] = None
        zero._lazy_init_hp_params_optimizer_state()
        if dist.get_world_size(zero.real_dp_process_group[i]) > 1:
            whole = zero.bit16_groups_flat[i]
            dist.all_gather_into_tensor(whole, weights, group=zero.real_dp_process_group[i])


@torch.no_grad()
def _step_3(zero: Any, closure: None = None) -> None:
    """As ``DeepSpeedZeroOptimizer_Stage3.step`` without offloading."""
    zero._pre_step()
    zero._partition_all_parameters()
    counted = [
        pair
        for i, group in enumerate(zero.fp16_groups)
        for pair in zip(zero.averaged_gradients[i], group, strict=True)
    ]
    scale = _clip(zero, counted)
    zero.zero_grad(set_to_none=True)
    for i in range(len(zero.fp16_groups)):
        for gradient in zero.averaged_gradients[i]:
            if gradient.is_cuda:  # it was made on the stream that reduces
                gradient.record_stream(torch.cuda.current_stream())
        weights = zero.fp16_partitioned_groups_flat[i]
        master = zero.fp32_partitioned_groups_flat[i]
        number = zero.sub_group_to_group_id[i]
        _update(zero, number, master, weights, zero.averaged_gradients[i], scale)
        zero.averaged_gradients[i] = None
    zero._post_step(set())


def _real(zero: Any, group: int) -> Iterator[Tensor]:
    """The gradients of a group that are no padding."""
    return (g for g in zero.averaged_gradients[group] if not getattr(g, "_zero_padding", False))


def _clip(zero: Any, counted: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What gradients are multiplied with; notes their norm before clipping.

    A parameter that tensor-parallel ranks hold whole counts on the first of them alone.
    """
    first = zero.model_parallel_rank == 0
    mine = [g for g, p in counted if first or getattr(p, "tensor_model_parallel", False)]
    square = squared_norms(mine).to(zero.device)
    dist.all_reduce(square, group=zero.dp_process_group)
    zero._model_parallel_all_reduce(tensor=square, op=dist.ReduceOp.SUM)
    norm = square.sqrt()
    zero._global_grad_norm = norm
    zero.overflow = False
    scale = torch.ones_like(norm)
    if zero.clip_grad > 0:
        scale = 1.0 / torch.clamp((norm + 1e-6) / zero.clip_grad, min=1.0)
    return torch.where(norm.isfinite(), scale, torch.nan)


def _update(
    zero: Any,
    group: int,
    master: Tensor,
    weights: Tensor,
    gradients: list[Tensor],
    scale: Tensor,
) -> None:
    """Update one partition; hooks on the step of torch's optimizer see it as they do otherwise."""
    options, state = zero.optimizer.param_groups[group], zero.optimizer.state[master]
    if not state:  # as torch's own makes it at the first step
        state["step"] = torch.zeros((), device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(master) for _ in range(2))
    partition = Partition(
        master=master.data,
        exp_avg=state["exp_avg"],
        exp_avg_sq=state["exp_avg_sq"],
        step=state["step"],
        weights=weights.data,
        gradients=gradients,
    )
    rates = Rates(options["lr"], options["betas"], options["eps"], options["weight_decay"])
    inner, shown = zero.optimizer, SimpleNamespace(param_groups=[{"params": [master]}])
    for hook in inner._optimizer_step_pre_hooks.values():
        hook(shown, (), {})
    adamw_step(partition, rates, scale)
    for hook in inner._optimizer_step_post_hooks.values():
        hook(shown, (), {})
        partition.weights.copy_(partition.master)
