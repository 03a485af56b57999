"""ZeRO 3: every parameter is cut evenly over replicas; its parts lie in flat sub-group buffers."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from lag_megatron.engine.deepspeed_adapter.partitioned import PartitionedAdapter, ZeroPartition


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also of one that ZeRO 3 has cut, on this tensor-parallel rank."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Zero3Adapter(PartitionedAdapter):
    """``DeepSpeedZeroOptimizer_Stage3`` without offloading."""

    stage = "ZeRO stage 3"
    required = (
        *PartitionedAdapter.required,
        "optimizer.fp32_partitioned_groups_flat",
        "optimizer.fp16_partitioned_groups_flat",
        "optimizer.fp16_groups",
        "optimizer.sub_group_to_group_id",
        "optimizer.persistent_parameters",
        "optimizer.grad_partitions_flat_buffer",
        "optimizer.zero_grad",
        "optimizer._partition_all_parameters",
        "optimizer._unflatten_partitioned_parameters",
        "optimizer._pre_step",
        "optimizer._post_step",
        "optimizer.parameter_offload.get_param_coordinator().is_invalid_trace",
        "optimizer.parameter_offload.get_param_coordinator()._invalidate_trace",
    )
    required_of_parameters = ("ds_shape", "ds_tensor")

    @property
    def masters(self) -> list[Tensor]:
        """One buffer for each sub-group of parameters."""
        return list(self._optimizer.fp32_partitioned_groups_flat)

    @property
    def master_groups(self) -> list[int]:
        """The parameter group that each sub-group was cut from."""
        group_of = self._optimizer.sub_group_to_group_id
        return [group_of[i] for i in range(len(self._optimizer.fp32_partitioned_groups_flat))]

    @property
    def trained_parameters(self) -> list[list[Parameter]]:
        """The sub-groups of each parameter group, one after the other."""
        groups: list[list[Parameter]] = [[] for _ in self._optimizer.param_groups]
        for number, parameters in zip(self.master_groups, self._optimizer.fp16_groups, strict=True):
            groups[number] += parameters
        return groups

    def untrained_weights(self, parameter: Parameter) -> Tensor:
        """This rank's shard, with its padding."""
        shard: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
        return shard.view(-1)

    @property
    def weights(self) -> list[Tensor | None]:
        """One buffer for each sub-group, with the same parameters."""
        return [weights.data for weights in self._optimizer.fp16_partitioned_groups_flat]

    def sync_weights(self, *, written: bool = False) -> None:
        """Cast this rank's part, and gather the parameters that stay whole between steps."""
        zero = self._optimizer
        zero._partition_all_parameters()
        super().sync_weights(written=written)
        for number in range(len(zero.fp16_partitioned_groups_flat)):
            zero._unflatten_partitioned_parameters(number)
        # Small parameters stay gathered between steps.
        if gathered := zero.persistent_parameters:
            gathered[0].all_gather(gathered)

    def prepare_partial_step(self) -> None:
        """Drop the gradients of the step before, and the order in which it fetched weights."""
        # A layer that does not run would show the gradients of the step before.
        self._optimizer.grad_partitions_flat_buffer.zero_()
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        # The next forward pass completes an order that is being recorded, and then fetches by it.
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def begin_step(self) -> None:
        """Reset the hooks' bookkeeping, and free the weights that are gathered."""
        self._optimizer._pre_step()
        self._optimizer._partition_all_parameters()

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of each parameter's gradient."""
        zero = self._optimizer
        for number, parameters in enumerate(zero.fp16_groups):
            yield from zip(zero.averaged_gradients[number], parameters, strict=True)

    def drop_unneeded_gradients(self) -> None:
        """Free what the parameters themselves hold."""
        self._optimizer.zero_grad(set_to_none=True)

    def partition(self, number: int) -> ZeroPartition:
        """A sub-group's partition of this rank."""
        zero = self._optimizer
        gradients = zero.averaged_gradients[number]
        for gradient in gradients:
            if gradient.is_cuda:  # it was made on the stream that reduces
                gradient.record_stream(torch.cuda.current_stream())
        return ZeroPartition(
            group=zero.sub_group_to_group_id[number],
            master=zero.fp32_partitioned_groups_flat[number],
            weights=zero.fp16_partitioned_groups_flat[number].data,
            gradients=gradients,
        )

    def finish_partition(self, number: int) -> None:
        """Free its gradients; weights are gathered by the next forward pass."""
        self._optimizer.averaged_gradients[number] = None

    def finish_step(self) -> None:
        """Share the new weights of the parameters that stay whole between steps."""
        self._optimizer._post_step(set())
