"""The ranks that train one model, and their process groups.

They are NCCL groups with CUDA and gloo groups without.  Tensor-parallel ranks are neighbours, as in
Megatron.
"""

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from megatron.core import parallel_state

from lag_megatron.checkpoint.state.layout import DEFAULT_SUB_GROUP_SIZE, Rank, Topology
from lag_megatron.config import RunConfig
from lag_megatron.config.deepspeed import deepspeed_config
from lag_megatron.distributed import heartbeat
from lag_megatron.distributed.rank_errors import Outcome, attempt, value_of
from lag_megatron.distributed.rendezvous import open_store, remove_shared_memory
from lag_megatron.errors import RunError

T = TypeVar("T")

DEFAULT_TIMEOUT = 300.0
# A collective waits longer than the heartbeat, whose error names the lost rank.
COLLECTIVE_TIMEOUT_MARGIN = datetime.timedelta(seconds=10)
# Of the control group: ranks wait while rank 0 tokenizes a corpus, and the heartbeat ends them when
# a rank is lost.
CONTROL_TIMEOUT = datetime.timedelta(days=30)


_PEAK_FLOPS = (("A100", 312e12), ("H100", 989e12), ("H200", 989e12))


@dataclass(frozen=True, slots=True)
class World:
    """This rank and its process groups, over all ranks of the run or over those of a probe group.

    Attributes:
        rank: index of this process; 0 is the coordinator, or the leader of a probe group.
        size: number of processes.
        device: where this process computes.
        control: gloo group of all ranks, for Python objects; calls wait as long as rank 0 works.
        data_group: the ranks that hold the same part of each tensor.
        data_rank: index among the data-parallel replicas.
        data_size: number of data-parallel replicas.
        tensor_rank: index among the ranks that share a replica's tensors.
        tensor_size: number of ranks that share a replica's tensors.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    data_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int

    @property
    def is_coordinator(self) -> bool:
        """Whether this is rank 0, which decides, writes files and prints for all ranks."""
        return self.rank == 0

    @property
    def coords(self) -> Rank:
        """This process's tensor-parallel and data-parallel rank."""
        return {"tensor_rank": self.tensor_rank, "data_rank": self.data_rank}

    @property
    def device_name(self) -> str:
        """The accelerator's name, or ``cpu``."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of this device by its data sheet; None where it is not known."""
        return peak_flops(self.device_name)

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier(group=self.control)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable ``value``, on every rank."""
        box = [value if self.is_coordinator else None]
        dist.broadcast_object_list(box, group=self.control, group_src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, by rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def run_on_rank0(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0; return its result, or raise its error, on every rank.

        Raises:
            LagError: the one that ``make`` raised.
            RankError: for any other exception.
        """
        outcome = attempt(make) if self.is_coordinator else None
        return self._value(self.broadcast(outcome), rank=0)

    def run_on_all_ranks(self, make: Callable[[], T]) -> list[T]:
        """Call ``make`` on every rank; return all results, by rank, on every rank.

        Raises:
            LagError: on every rank, that of the first rank whose ``make`` raised one.
            RankError: on every rank, for any other exception of that rank.
        """
        outcomes = self.gather(attempt(make))
        return [self._value(outcome, rank=rank) for rank, outcome in enumerate(outcomes)]

    def _value(self, outcome: Outcome, *, rank: int) -> Any:
        # False on the leader of a probe group, which reports the error for its ranks.
        on_all_ranks = self.size == dist.get_world_size() or not self.is_coordinator
        return value_of(outcome, rank=rank, on_all_ranks=on_all_ranks)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        tensor = torch.tensor(int(flag))
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return bool(tensor.item())


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its data sheet; None where it is not known."""
    return next((peak for name, peak in _PEAK_FLOPS if name in device_name), None)


def environment() -> tuple[int, int, int]:
    """Rank, world size and local rank that the launcher set; (0, 1, 0) without one.

    Raises:
        RunError: if one of them is no number, or ``WORLD_SIZE`` is set and ``LOCAL_RANK`` is not.
    """
    rank, size, local_rank = (_variable(name, default) for name, default in _LAUNCHER_VARIABLES)
    if size > 1 and "LOCAL_RANK" not in os.environ:
        raise RunError(
            "WORLD_SIZE is set, but LOCAL_RANK is not: every rank would take device 0. Start the "
            "ranks with deepspeed or torchrun, or export LOCAL_RANK."
        )
    return rank, size, local_rank


_LAUNCHER_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def _variable(name: str, default: int) -> int:
    """A variable of the launcher's, of which WORLD_SIZE is 1 or more and the others 0 or more."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or (name == "WORLD_SIZE" and int(text) < 1):
        raise RunError(
            f"the environment's {name} is {text!r}, expected a whole number. Start the ranks with "
            "deepspeed or torchrun, or unset it."
        )
    return int(text)


def local_world_size(size: int) -> int:
    """The number of ranks on this host; ``size`` where the launcher does not set it."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or size)


def start_world(*, tensor: int, timeout: float = DEFAULT_TIMEOUT) -> World:
    """Join the process groups that the launcher's environment describes.

    Works under ``deepspeed``, ``torchrun`` and plain ``python`` (a world of one).  All ranks end
    when one does not respond for ``timeout`` seconds, or does not enter a collective for as long.

    Raises:
        RunError: if the ranks do not divide into tensor-parallel groups, or do not all connect.
    """
    rank, size, local_rank = environment()
    if size % tensor or local_world_size(size) % tensor:
        raise RunError(
            f"parallel.tensor: {tensor} does not divide the world of {size} ranks, or the "
            f"{local_world_size(size)} of this host: its groups must not lie across hosts. Start a "
            f"multiple of {tensor} ranks on each."
        )
    device = _device(local_rank)
    wait = datetime.timedelta(seconds=timeout) + COLLECTIVE_TIMEOUT_MARGIN
    # DeepSpeed makes its groups without a time-out; torch then takes these two.
    c10d.default_pg_timeout = wait
    vars(c10d)["default_pg_nccl_timeout"] = wait
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = open_store(rank, size, local_rank)
        store.set_timeout(wait)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=wait / datetime.timedelta(minutes=1),
        )
    world = World(
        rank=rank,
        size=size,
        device=device,
        control=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT),
        data_group=parallel_state.get_data_parallel_group(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
    )
    hosts = world.gather(socket.gethostname())
    heartbeat.start(rank, hosts, limit=timeout, broadcast=world.broadcast)
    return world


def stop_world() -> None:
    """Destroy the process groups."""
    if dist.is_initialized():
        heartbeat.stop()
        dist.barrier()  # no rank may destroy a group that another one still uses
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        remove_shared_memory()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


class DeepSpeedGroups:
    """A world's process groups under the names that DeepSpeed calls on its ``mpu``.

    Megatron-Core 0.16 says ``tensor_model_parallel`` where DeepSpeed says ``model_parallel``.
    Everything that is not defined here is Megatron-Core's.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)

    def __init__(self, world: World) -> None:
        self._world = world

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The group whose ranks reduce their gradients together."""
        return self._world.data_group

    def get_data_parallel_rank(self) -> int:
        """This rank's index in the data-parallel group."""
        return self._world.data_rank

    def get_data_parallel_world_size(self) -> int:
        """The size of the data-parallel group."""
        return self._world.data_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(self._world.data_group)

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)


def topology_of(config: RunConfig, world: World) -> Topology:
    """How DeepSpeed shards the training state of this configuration."""
    zero = deepspeed_config(config, world_size=world.size)["zero_optimization"]
    return Topology(
        zero_stage=config.parallel.zero_stage,
        data_size=world.data_size,
        tensor_size=world.tensor_size,
        precision=config.parallel.precision,
        sub_group_size=int(zero.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE)),
    )
