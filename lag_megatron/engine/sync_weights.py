"""The weights that a DeepSpeed engine computes with, which follow its fp32 masters."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lag_megatron.checkpoint.state.layout import Topology


def own_weights(optimizer: Any, topology: Topology, *, data_rank: int) -> list[Tensor | None]:
    """A rank's part of them, flat, by buffer of masters; None where the masters are they."""
    if topology.zero_stage == 3:
        return [weights.data for weights in optimizer.fp16_partitioned_groups_flat]
    if topology.zero_stage:
        parts = optimizer.parallel_partitioned_bit16_groups
        return [part[data_rank].data for part in parts]
    if topology.precision == "fp32":
        return [None for group in optimizer.param_groups for _ in group["params"]]
    return [weight.data.view(-1) for group in optimizer.fp16_groups for weight in group]


def follow_masters(
    optimizer: Any,
    topology: Topology,
    masters: Sequence[Tensor],
    *,
    data_rank: int,
    written: bool,
) -> None:
    """Bring them up to the masters, together with all replicas.

    With ``written`` this rank's own part is, and has only to reach the others, as DeepSpeed's
    ``update_lp_params`` and ``_reassign_or_swap_out_partitioned_parameters`` have them do.
    """
    stage = topology.zero_stage
    if stage == 3:
        optimizer._partition_all_parameters()
    own = own_weights(optimizer, topology, data_rank=data_rank)
    if not written:
        for weights, master in zip(own, masters, strict=True):
            if weights is not None:
                weights.copy_(master.detach().view(-1))
    if stage == 3:
        for number in range(len(own)):
            optimizer._unflatten_partitioned_parameters(number)
        if kept_whole := optimizer.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)
    elif stage and topology.data_size > 1:
        for number, weights in enumerate(own):
            whole = optimizer.bit16_groups_flat[number].data
            dist.all_gather_into_tensor(
                whole, weights, group=optimizer.real_dp_process_group[number]
            )
