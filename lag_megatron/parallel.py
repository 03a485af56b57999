"""Processes and their groups: who computes what, and over which wires.

NCCL where CUDA is, gloo elsewhere.  Tensor-parallel ranks are neighbours, as in Megatron.
"""

import datetime
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from lag_megatron.checkpoint.layout import DEFAULT_SUB_GROUP_SIZE, Rank, Topology
from lag_megatron.config import RunConfig
from lag_megatron.config.deepspeed import deepspeed_config
from lag_megatron.errors import LagError, RunError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
# Ranks wait here while rank 0 tokenizes a corpus; a peer that dies is noticed at once all the same.
CONTROL_TIMEOUT = datetime.timedelta(days=1)


_PEAK_FLOPS = (("A100", 312e12), ("H100", 989e12), ("H200", 989e12))


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of the run.

    Attributes:
        rank: index of this process, 0 is the coordinator.
        size: number of processes.
        device: where this process computes.
        control: all ranks over gloo, for messages; it waits as long as the coordinator works.
        data_rank: index among the data-parallel replicas.
        data_size: number of data-parallel replicas.
        tensor_rank: index among the ranks that share a replica's tensors.
        tensor_size: number of ranks that share a replica's tensors.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int

    @property
    def is_coordinator(self) -> bool:
        """Whether this process decides, writes the journal and talks to the user."""
        return self.rank == 0

    @property
    def place(self) -> Rank:
        """This process's tensor-parallel and data-parallel rank."""
        return {"tensor_rank": self.tensor_rank, "data_rank": self.data_rank}

    @property
    def device_name(self) -> str:
        """The accelerator's name, or ``cpu``."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of this device by its data sheet; None where it is not known."""
        return next((peak for name, peak in _PEAK_FLOPS if name in self.device_name), None)

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier(group=self.control)

    def broadcast(self, value: Any) -> Any:
        """The coordinator's picklable ``value``, on every rank."""
        box = [value if self.is_coordinator else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, by rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_coordinator(self, make: Callable[[], T]) -> T:
        """What the coordinator makes, on every rank; what it raises is raised on every rank.

        Raises:
            LagError: the one that ``make`` raised.
            RankError: for anything else that it raised.
        """
        outcome = _attempt(make) if self.is_coordinator else None
        return _value(self.broadcast(outcome), rank=0)

    def from_each(self, make: Callable[[], T]) -> list[T]:
        """What each rank makes, by rank, on every rank.

        Raises:
            LagError: the first one that a rank's ``make`` raised, on every rank.
            RankError: for anything else that a rank's ``make`` raised, on every rank.
        """
        outcomes = self.gather(_attempt(make))
        return [_value(outcome, rank=rank) for rank, outcome in enumerate(outcomes)]

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over the data-parallel replicas, in double precision."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
        return list(tensor.tolist())

    def sum_over_tensor(self, value: float) -> float:
        """Sum over the ranks that share this replica's tensors, in double precision."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
        return float(tensor.item())

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        tensor = torch.tensor(int(flag))
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return bool(tensor.item())


class RankError(RuntimeError):
    """A bug, or the machine's failure, on one rank, raised on all so that none waits for it."""


def _attempt(make: Callable[[], Any]) -> tuple[Any, LagError | str | None]:
    try:
        return make(), None
    except LagError as error:
        error.on_all_ranks = True
        return None, error
    except Exception:  # raised again by _value, on every rank
        return None, traceback.format_exc()


def _value(outcome: tuple[Any, LagError | str | None], *, rank: int) -> Any:
    value, error = outcome
    if isinstance(error, str):
        raise RankError(f"rank {rank} failed:\n{error}")
    if error is not None:
        error.on_all_ranks = True  # lost on the way: exceptions are pickled without attributes
        raise error
    return value


def environment() -> tuple[int, int, int]:
    """Rank, world size and local rank that the launcher set; (0, 1, 0) without one.

    Raises:
        RunError: if ranks were started without a word on which of a host's devices is whose.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" not in os.environ:
        raise RunError(
            "WORLD_SIZE is set, but LOCAL_RANK is not: every rank would take device 0. Start the "
            "ranks with deepspeed or torchrun, or export LOCAL_RANK."
        )
    return tuple(int(os.environ.get(k, d)) for k, d in _LAUNCHER_VARIABLES)  # type: ignore[return-value]


_LAUNCHER_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def start_world(*, tensor: int) -> World:
    """Join the process groups that the launcher's environment describes.

    Works under ``deepspeed``, ``torchrun`` and plain ``python`` (a world of one).

    Raises:
        RunError: if the ranks do not divide into tensor-parallel groups.
    """
    rank, size, local_rank = environment()
    if size % tensor:
        raise RunError(
            f"parallel.tensor: {tensor} does not divide the world of {size} ranks. "
            f"Start a multiple of {tensor} ranks."
        )
    device = _device(local_rank)
    if not dist.is_initialized():
        if size == 1:
            # A world of one needs no launcher, but DeepSpeed asks for what launchers set.
            os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_rank)})
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            store: dict[str, Any] = {"store": dist.HashStore()}
        else:
            store = {"init_method": "env://"}
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT, **store
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, create_gloo_process_groups=False
        )
    return World(
        rank=rank,
        size=size,
        device=device,
        control=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


def stop_world() -> None:
    """Leave the process groups; the barrier keeps fast ranks from tearing slow ones down."""
    if dist.is_initialized():
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        _remove_shared_memory()


def _remove_shared_memory() -> None:
    """DeepSpeed's CPU collectives leave 66 MiB a rank in /dev/shm for every port they used."""
    port, local_rank = os.environ.get("MASTER_PORT"), os.environ.get("LOCAL_RANK")
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_{local_rank}"):
        left.unlink(missing_ok=True)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


class DeepSpeedGroups:
    """Megatron-Core's groups under the names that DeepSpeed asks its ``mpu`` for.

    Megatron-Core 0.16 says ``tensor_model_parallel`` where DeepSpeed says ``model_parallel``.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)


def topology_of(config: RunConfig, world: World) -> Topology:
    """How DeepSpeed spreads a state of this configuration over the ranks."""
    zero = deepspeed_config(config, world_size=world.size)["zero_optimization"]
    return Topology(
        zero_stage=config.parallel.zero_stage,
        data_size=world.data_size,
        tensor_size=world.tensor_size,
        precision=config.parallel.precision,
        sub_group_size=int(zero.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE)),
    )
