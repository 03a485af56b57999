"""What an initialized DeepSpeed engine says about itself, whoever built it."""

from typing import Any

import torch
import torch.distributed as dist

from lag_megatron.checkpoint.state.layout import Rank, Topology
from lag_megatron.checkpoint.state.optimizer_states import Optimizer
from lag_megatron.errors import PlanError

_WAY_OUT = (
    "Grow the checkpoint on disk with lag_megatron.grow, and load it with engine.load_checkpoint."
)
# The classes that DeepSpeed wraps optimizers in and that have an adapter, by ZeRO stage.
_WRAPPERS = {
    0: "FP16_UnfusedOptimizer",
    1: "DeepSpeedZeroOptimizer",
    2: "DeepSpeedZeroOptimizer",
    3: "DeepSpeedZeroOptimizer_Stage3",
}


def place_of(engine: Any) -> tuple[Topology, Rank]:
    """How an engine's state is spread over ranks, and which part this rank has.

    Raises:
        PlanError: if other ranks than data-parallel and tensor-parallel ones share the work.
    """
    topology = Topology(
        zero_stage=engine.zero_optimization_stage(),
        data_size=engine.dp_world_size,
        tensor_size=engine.mp_world_size,
        precision=(
            "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
        ),
        sub_group_size=int(engine.zero_sub_group_size()),
    )
    if topology.data_size * topology.tensor_size != dist.get_world_size():
        raise PlanError(
            f"this engine has {topology.data_size} data-parallel x {topology.tensor_size} "
            f"tensor-parallel ranks of {dist.get_world_size()}: sequence and pipeline parallelism "
            "are not understood here."
        )
    data_rank = dist.get_rank(engine.data_parallel_group)
    tensor_rank = engine.mpu.get_model_parallel_rank() if topology.tensor_size > 1 else 0
    return topology, {"tensor_rank": tensor_rank, "data_rank": data_rank}


def require_adaptable(engine: Any, topology: Topology) -> None:
    """Refuse an engine that keeps its state where no adapter looks for it.

    Raises:
        PlanError: naming the class or the option, with the way out.
    """
    wrapper = type(engine.optimizer)
    plain = topology.zero_stage == 0 and topology.precision == "fp32"
    known = (
        isinstance(engine.optimizer, torch.optim.Optimizer)
        if plain
        else wrapper.__name__ == _WRAPPERS[topology.zero_stage]
    )
    if not known:
        raise PlanError(
            f"DeepSpeed keeps this engine's state in {wrapper.__name__} (ZeRO-"
            f"{topology.zero_stage}, {topology.precision}), which cannot be overwritten in place. "
            f"{_WAY_OUT}"
        )
    offloads = (engine.zero_offload_optimizer(), engine.zero_offload_param())
    options = {
        "offload_optimizer or offload_param": any(o and o.device != "none" for o in offloads),
        "round_robin_gradients": engine.zero_round_robin_gradients(),
    }
    for option in (option for option, is_set in options.items() if is_set):
        raise PlanError(
            f"zero_optimization.{option}: such a state cannot be overwritten in place. {_WAY_OUT}"
        )


def optimizer_kind(optimizer: torch.optim.Optimizer) -> Optimizer:
    """Which states an optimizer keeps.

    Raises:
        PlanError: if it is neither Adam, of torch or DeepSpeed, nor torch's Adafactor.
    """
    if isinstance(optimizer, torch.optim.Adafactor):
        return "adafactor"
    adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) or (
        type(optimizer).__name__ in ("FusedAdam", "DeepSpeedCPUAdam")
    )
    if not adam or any(group.get("amsgrad") for group in optimizer.param_groups):
        name = type(optimizer).__name__ + (" with amsgrad" if adam else "")
        raise PlanError(
            f"the engine's optimizer is {name}, whose states are not understood here. Take Adam, "
            "of torch or of DeepSpeed, or torch's Adafactor."
        )
    return "adamw"
