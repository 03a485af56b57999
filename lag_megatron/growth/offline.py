"""Growing a whole checkpoint in one process, several target shards at a time."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint import commit
from lag_megatron.checkpoint.integrity import require_sound
from lag_megatron.checkpoint.layout import Topology
from lag_megatron.checkpoint.zero import ZeroCheckpoint
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.files import flush_to_disk
from lag_megatron.growth.materialize import Growth
from lag_megatron.growth.plan import GrowthPlan


def grow_checkpoint(
    source: Path,
    target: Path,
    plan: GrowthPlan,
    *,
    topology: Topology | None = None,
    workers: int = 1,
    written: Callable[[int], object] = lambda count: None,
) -> Growth:
    """Grow a whole checkpoint and commit it.

    The source's files are compared with their checksums meanwhile, as far as they have any;
    nothing is committed unless all of them are sound.

    Args:
        source: tag directory.
        target: tag directory to come; it must not exist.
        plan: what to do.
        topology: how the grown checkpoint is spread; the source's by default.
        workers: threads that write shards; each needs a few megabytes.
        written: told the number of bytes after each piece, e.g. a progress bar's ``update``.

    Raises:
        PlanError: when the plan does not fit the checkpoint or the target exists.
        CheckpointError: when the source is damaged or the disk too small.
    """
    growth = Growth(ZeroCheckpoint.open(source), plan, topology)
    growth.source.check_every_file()
    needed = growth.bytes_to_write
    draft = commit.temporary(target)
    if target.exists():
        if not growth.was_published(target):
            raise PlanError(f"{target}: exists already. Name another target or remove it.")
        commit.point_latest(target)  # killed between the two, or asked for twice
        return growth
    try:
        commit.remove(draft)
        draft.mkdir(parents=True)
        commit.require_space(draft, needed=needed, what="the grown checkpoint")
        growth.publish(target, _write_all(growth, draft, workers, written))
    except OSError as error:
        commit.remove(draft)
        raise CheckpointError(
            f"{error.filename or target}: cannot write there: {error.strerror or error}. "
            "Name another target."
        ) from None
    except BaseException:
        commit.remove(draft)
        raise
    return growth


def _write_all(
    growth: Growth, folder: Path, workers: int, written: Callable[[int], object]
) -> dict[str, Any]:
    topology = growth.topology
    ranks = itertools.product(range(topology.tensor_size), range(topology.data_size))
    growth.draft  # noqa: B018  # planned once here, not once in each thread
    failed = threading.Event()

    def note(count: int) -> None:
        if failed.is_set():
            raise _Abandoned
        written(count)

    with _single_threaded_torch(), _pool(1) as disk, _pool(1) as checker, _pool(workers) as pool:
        # Beside the writing: the source is compared with its checksums, and finished files go to
        # the disk while the next are made.
        flushed: list[Future[None]] = []
        checked = checker.submit(require_sound, growth.source.path)
        shards = [
            pool.submit(
                growth.write_rank,
                folder,
                tensor_rank=tensor_rank,
                data_rank=data_rank,
                written=note,
                flush=lambda path: flushed.append(disk.submit(flush_to_disk, path)),
            )
            for tensor_rank, data_rank in ranks
        ]
        tasks: list[Future[Any]] = [checked, *shards]
        try:
            for task in as_completed(tasks):
                task.result()
        except BaseException:
            failed.set()  # the others end at their next piece
            raise
        for waited in flushed:
            waited.result()
    return {name: entry for shard in shards for name, entry in shard.result().items()}


class _Abandoned(Exception):
    """Ends a worker after another one has failed."""


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Threads; what has not begun is dropped when one fails."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Pieces are small: torch's own threads would cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
