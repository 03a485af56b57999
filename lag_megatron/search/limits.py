"""Limits of time and memory: a probe that exceeds one ends its process and, with it, the job.

The other ranks of the group wait in a collective call and cannot be asked to go on.  What happened
is written beside the candidate's files, and the next start reads it there.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from lag_megatron.distributed.watchdog import watched
from lag_megatron.errors import RunError
from lag_megatron.search.candidate_dir import CandidateDir


@contextlib.contextmanager
def time_limit(
    candidate_dir: CandidateDir, *, attempt: int, seconds: float | None, stacks: Path
) -> Iterator[Callable[[], None]]:
    """End this process when a candidate makes no progress; gives what to call at each progress.

    Args:
        candidate_dir: where the attempt is marked as hung.
        attempt: its number.
        seconds: between two calls; None for no limit.
        stacks: folder for the stacks of all threads.
    """
    id_, rank = candidate_dir.path.name, dist.get_rank()

    def expired() -> str:
        candidate_dir.mark_hung(attempt=attempt, seconds=float(seconds or 0))
        return (
            f"[rank {rank}] {id_}: no progress for growth.rung_timeout = {seconds:g} "
            f"s; all stacks are in {stacks}. The same command goes on from the last "
            "saved states; after two such attempts the candidate has lost."
        )

    file = stacks / f"{id_}-rank{rank}.txt"
    with watched(seconds, stacks=file, on_expiry=expired) as progressed:
        yield progressed


@contextlib.contextmanager
def memory_limit(candidate_dir: CandidateDir, *, step_fits: Callable[[], bool]) -> Iterator[None]:
    """Turn a lack of memory into a message.

    Args:
        candidate_dir: where the candidate is marked as failed, so that the next start drops it.
        step_fits: whether a step of the grown model has ever fitted.  All candidates have one
            shape: if the first step did not fit, no other will, and the candidate has not lost.

    Raises:
        RunError: when memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        id_, rank = candidate_dir.path.name, dist.get_rank()
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        if step_fits():
            candidate_dir.mark_failed(f"out of memory on rank {rank}: {what}", rank=rank)
            remedy = "The candidate has lost; the same command goes on without it."
        else:
            remedy = (
                "Not one step of the grown model fits: lower parallel.micro_batch or "
                "growth.probe_groups and run the same command again."
            )
        raise RunError(f"{id_}: out of memory on rank {rank}: {what} {remedy}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    messages = ("allocate memory", "OutOfMemoryError")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        message in str(error) for message in messages
    )
