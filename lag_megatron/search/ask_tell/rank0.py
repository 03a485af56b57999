"""Work that rank 0 does for all ranks of a job, if the program is one of several ranks.

The processes are those of torch.distributed's default group.  Torch is not imported for it: a
program whose ranks talk to each other has done so itself.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from lag_megatron.errors import LagError, RunError

T = TypeVar("T")


def on_rank0(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, on all ranks; collective.

    Raises:
        LagError: on all ranks, what rank 0 raised.
        RunError: on the others, where rank 0 raised something else.
    """
    dist = _distributed()
    if dist is None:
        return work()
    box: list[Any] = [None, None]
    try:
        if dist.get_rank() == 0:
            box[0] = work()
    except LagError as error:
        error.on_all_ranks = True
        box[1] = error
        raise
    except BaseException as error:
        box[1] = RunError(f"rank 0 failed: {error!r}.")
        raise
    finally:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def wait_for_all_ranks() -> None:
    """Return when all ranks have called this."""
    dist = _distributed()
    if dist is not None:
        dist.barrier()


def _distributed() -> Any:
    """``torch.distributed`` where this process is one of several ranks; None elsewhere."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    return dist if dist.get_world_size() > 1 else None
