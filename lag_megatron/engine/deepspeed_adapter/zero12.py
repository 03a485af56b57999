"""ZeRO 1 and 2: one flat buffer of masters for each parameter group, cut evenly over replicas."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lag_megatron.engine.deepspeed_adapter.partitioned import PartitionedAdapter, ZeroPartition


class Zero12Adapter(PartitionedAdapter):
    """``DeepSpeedZeroOptimizer`` without offloading."""

    stage = "ZeRO stage 1 or 2"
    required = (
        *PartitionedAdapter.required,
        "optimizer.single_partition_of_fp32_groups",
        "optimizer.parallel_partitioned_bit16_groups",
        "optimizer.bit16_groups",
        "optimizer.bit16_groups_flat",
        "optimizer.real_dp_process_group",
        "optimizer.params_in_partition",
        "optimizer.params_not_in_partition",
        "optimizer.all_grad_tensors",
        "optimizer.micro_step_id",
        "optimizer.dtype",
        "optimizer.gradient_accumulation_dtype",
        "optimizer.free_grad_in_param_list",
        "optimizer.reduce_independent_p_g_buckets_and_remove_grads",
        "optimizer._lazy_init_hp_params_optimizer_state",
    )

    @property
    def masters(self) -> list[Tensor]:
        """One buffer for each parameter group."""
        return list(self._optimizer.single_partition_of_fp32_groups)

    @property
    def master_groups(self) -> list[int]:
        """Each buffer is a group."""
        return list(range(len(self._optimizer.single_partition_of_fp32_groups)))

    @property
    def trained_parameters(self) -> list[list[Parameter]]:
        """The parameters that each group's flat weights were made of."""
        return [list(group) for group in self._optimizer.bit16_groups]

    @property
    def weights(self) -> list[Tensor | None]:
        """This rank's parts of the groups' flat weights."""
        return [self._weights(number) for number in self.master_groups]

    def _weights(self, number: int) -> Tensor:
        rank = dist.get_rank(self._optimizer.real_dp_process_group[number])
        weights: Tensor = self._optimizer.parallel_partitioned_bit16_groups[number][rank].data
        return weights

    def sync_weights(self, *, written: bool = False) -> None:
        """Cast this rank's part, and gather all parts."""
        super().sync_weights(written=written)
        for number in self.master_groups:
            self._gather_weights(number)

    def _gather_weights(self, number: int) -> None:
        group = self._optimizer.real_dp_process_group[number]
        if dist.get_world_size(group) > 1:
            whole = self._optimizer.bit16_groups_flat[number].data
            dist.all_gather_into_tensor(whole, self._weights(number), group=group)

    def skip_reduction_without_replicas(self) -> None:
        """Replace the reduction if the data-parallel group has one rank."""
        zero = self._optimizer
        # Where gradients add up in another type, only the reduction fills what is stepped on.
        if zero.gradient_accumulation_dtype != zero.dtype:
            return
        if dist.get_world_size(zero.dp_process_group) == 1:
            # The mean over one replica is the gradient itself.  DeepSpeed copies it into a bucket,
            # widens, divides by one, narrows and copies it out: a seventh of a step on a CPU.
            zero.reduce_independent_p_g_buckets_and_remove_grads = _leave_gradient

    def begin_step(self) -> None:
        """Count micro-steps anew."""
        self._optimizer.micro_step_id = -1

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The gradients of the parameters that begin or go on in this rank's partition."""
        zero = self._optimizer
        for number in self.master_groups:
            # A buffer's padding has no parameter and comes last.
            parameters = zero.params_in_partition[number]
            yield from zip(zero.averaged_gradients[number], parameters, strict=False)

    def drop_unneeded_gradients(self) -> None:
        """Free those of parameters outside this rank's partitions."""
        for parameters in self._optimizer.params_not_in_partition:
            self._optimizer.free_grad_in_param_list(parameters)

    def partition(self, number: int) -> ZeroPartition:
        """A parameter group's partition of this rank."""
        zero = self._optimizer
        master = zero.single_partition_of_fp32_groups[number]
        gradients = zero.averaged_gradients[number]
        return ZeroPartition(number, master, self._weights(number), gradients)

    def finish_partition(self, number: int) -> None:
        """Free its gradients and gather the group's weights."""
        zero = self._optimizer
        zero.free_grad_in_param_list(zero.params_in_partition[number])
        zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        zero._lazy_init_hp_params_optimizer_state()
        self._gather_weights(number)


def _leave_gradient(parameter: Tensor, group: int) -> None:
    """Instead of a reduction: the epilogue of DeepSpeed's backward finds the gradient there."""
