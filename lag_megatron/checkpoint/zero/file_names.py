"""DeepSpeed's names for the files of a checkpoint and for the buffers in them."""

from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.state.layout import GroupState, State, Topology
from lag_megatron.checkpoint.state.optimizer_states import MOMENTS

_FLAT_MASTERS = "single_partition_of_fp32_groups"


def model_file(topology: Topology, *, tensor_rank: int, data_rank: int) -> str:
    """Name of the file with a rank's weights and counters."""
    if topology.zero_stage == 3:
        return f"zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_model_states.pt"
    return f"mp_rank_{tensor_rank:02d}_model_states.pt"


def optimizer_file(topology: Topology, *, tensor_rank: int, data_rank: int) -> str | None:
    """Name of the file with a rank's optimizer shard; None where the model file holds it."""
    if topology.zero_stage == 0:
        return None
    prefix = "bf16_" if topology.precision == "bf16" else ""
    return f"{prefix}zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"


def files_of_rank(topology: Topology, *, tensor_rank: int, data_rank: int) -> list[str]:
    """Names of the files that a rank writes."""
    ranks = {"tensor_rank": tensor_rank, "data_rank": data_rank}
    optimizer = optimizer_file(topology, **ranks)
    names = [optimizer] if optimizer else []
    if topology.zero_stage == 3 or data_rank == 0:
        names.append(model_file(topology, **ranks))
    return names


def files_of(topology: Topology) -> list[str]:
    """Names of all files of a checkpoint."""
    return [
        name
        for tensor_rank in range(topology.tensor_size)
        for data_rank in range(topology.data_size)
        for name in files_of_rank(topology, tensor_rank=tensor_rank, data_rank=data_rank)
    ]


def state_buffer(
    topology: Topology, model: Any, states: Any, key: int, state: State, names: list[str]
) -> Tensor:
    """The flat buffer ``key`` of ``state`` within a rank's loaded files."""
    buffer: Tensor
    if state != "fp32":
        buffer = torch_optimizer_state(topology, model, states)["state"][key][state]
    elif topology.zero_stage == 0:
        buffer = _unpartitioned_master(topology, model, key, names)
    else:
        masters = "fp32_flat_groups" if topology.zero_stage == 3 else _FLAT_MASTERS
        buffer = states["optimizer_state_dict"][masters][key]
    return buffer.contiguous().view(-1)


def torch_optimizer_state(topology: Topology, model: Any, states: Any) -> Any:
    """The torch optimizer's ``state_dict`` within a rank's loaded files."""
    if topology.zero_stage == 0:
        optimizer = model["optimizer"]
        return optimizer if topology.precision == "fp32" else optimizer["optimizer_state_dict"]
    optimizer = states["optimizer_state_dict"]
    name = "optimizer_state_dict" if topology.zero_stage == 3 else "base_optimizer_state"
    return optimizer[name]


def _unpartitioned_master(topology: Topology, model: Any, key: int, names: list[str]) -> Any:
    if topology.precision == "fp32":
        return model["module"][names[key]]
    return [tensor for group in model["optimizer"]["fp32_groups"] for tensor in group][key]


def step_counts(topology: Topology, states: Any) -> list[int]:
    """The step counter of each buffer."""
    entries = torch_optimizer_state(topology, None, states)["state"]
    return [int(entry.get("step", 0)) for entry in entries.values()]


def group_states(topology: Topology, model: Any, states: Any) -> list[GroupState]:
    """The optimizer's settings and counters by parameter group, from a rank's loaded files."""
    inner = torch_optimizer_state(topology, model, states)
    return [
        GroupState(
            {key: value for key, value in group.items() if key != "params"},
            {k: v for k, v in inner["state"][group["params"][0]].items() if k not in MOMENTS},
        )
        for group in inner["param_groups"]
    ]
