"""Growing a ZeRO checkpoint in one process, several target shards at a time."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.writer.context import WriteContext
from lag_megatron.checkpoint.writer.job import Part, WriteJob, write
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.apply.trainer_folder import trainer_files
from lag_megatron.growth.plan import GrowthPlan


def grow_checkpoint(
    source: Path,
    target: Path,
    plan: GrowthPlan,
    *,
    topology: Topology | None = None,
    workers: int = 1,
    written: Callable[[int], object] = lambda count: None,
    lock: bool = True,
    allow_nonfinite: bool = False,
) -> GrownState:
    """Grow a ZeRO checkpoint and commit it.

    Meanwhile the source's files are verified against their checksums, if they have any; nothing is
    committed unless all of them are sound.

    Args:
        source: tag directory.
        target: tag directory to write; it must not exist.
        plan: the growth plan.
        topology: of the grown checkpoint; the source's by default.
        workers: threads that write shards; each needs a few megabytes.
        written: called with the number of bytes after each piece, e.g. a progress bar's ``update``.
        lock: refuse a second writer of the target.
        allow_nonfinite: go on where values of the source are NaN or infinite.

    Returns:
        the grown state.

    Raises:
        PlanError: when the plan does not fit the checkpoint or the target exists.
        RunError: when another process writes the target, or its file system has no locks.
        CheckpointError: when the source is damaged, has values that are not finite, or the disk is
            too small.
    """
    grown = GrownState(ZeroCheckpoint.open(source), plan, topology, allow_nonfinite)
    grown.source.check_every_file()
    write(zero_job(grown, target), workers=workers, written=written, lock=lock)
    return grown


def zero_job(grown: GrownState, target: Path) -> WriteJob:
    """The job that writes the tag directory ``target`` as DeepSpeed's shards."""
    topology = grown.topology
    grown.spec  # noqa: B018  # cached here, so that threads do not each compute it
    return WriteJob(
        target=target,
        source=grown.source.path,
        parts=[
            Part(f"{tensor_rank}-{data_rank}", partial(_write, grown, tensor_rank, data_rank))
            for tensor_rank, data_rank in itertools.product(
                range(topology.tensor_size), range(topology.data_size)
            )
        ],
        metadata=grown.metadata,
        needed=grown.bytes_to_write,
        title="the grown checkpoint",
        check=grown.source.require_sound,
        beside=trainer_files(grown, target).write,
    )


def _write(
    grown: GrownState, tensor_rank: int, data_rank: int, folder: Path, context: WriteContext
) -> dict[str, object]:
    return grown.write_rank(folder, tensor_rank=tensor_rank, data_rank=data_rank, context=context)
