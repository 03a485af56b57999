"""The store that ranks meet at when they start, and shared memory to remove when they end."""

import datetime
import os
from pathlib import Path

import torch.distributed as dist

from lag_megatron.errors import RunError

# Hosts start at different speeds, and the first start reads all libraries from a shared disk.
_TIMEOUT = datetime.timedelta(minutes=10)


def open_store(rank: int, size: int, local_rank: int) -> dist.Store:
    """The store for the rendezvous of all ranks, once all have connected to it.

    Raises:
        RunError: on rank 0, if not all ranks connect, or its port is taken.
    """
    if size == 1:
        # A world of one needs no launcher, but DeepSpeed asks for what launchers set.
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_rank)})
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        return dist.HashStore()
    try:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=_TIMEOUT))
    except dist.DistError as error:
        if rank != 0:
            raise  # what rank 0 prints, perhaps on another host, may be about another error
        raise RunError(
            f"the {size} ranks did not meet at {os.environ.get('MASTER_ADDR')}, port "
            f"{os.environ.get('MASTER_PORT')}: {error}. See that every host starts its ranks, that "
            "the address is reached from all, and that no other run has this port (--master_port)."
        ) from None
    return store


def remove_shared_memory() -> None:
    """Remove the 66 MiB a rank that DeepSpeed's CPU collectives leave in /dev/shm."""
    port, local_rank = os.environ.get("MASTER_PORT"), os.environ.get("LOCAL_RANK")
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_{local_rank}"):
        left.unlink(missing_ok=True)
