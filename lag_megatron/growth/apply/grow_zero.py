"""Growing a whole checkpoint in one process, several target shards at a time."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.writer.file_writer import WriteContext
from lag_megatron.checkpoint.writer.job import Part, WriteJob, write
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.plan import GrowthPlan


def grow_checkpoint(
    source: Path,
    target: Path,
    plan: GrowthPlan,
    *,
    topology: Topology | None = None,
    workers: int = 1,
    written: Callable[[int], object] = lambda count: None,
) -> GrownState:
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
    growth = GrownState(ZeroCheckpoint.open(source), plan, topology)
    growth.source.check_every_file()
    write(zero_job(growth, target), workers=workers, written=written)
    return growth


def zero_job(growth: GrownState, target: Path) -> WriteJob:
    """What has to be written as the tag directory ``target``, as DeepSpeed's shards."""
    topology = growth.topology
    growth.draft  # noqa: B018  # planned once here, not once in each thread
    return WriteJob(
        target=target,
        parts=[
            Part(f"{tensor_rank}-{data_rank}", partial(_write, growth, tensor_rank, data_rank))
            for tensor_rank, data_rank in itertools.product(
                range(topology.tensor_size), range(topology.data_size)
            )
        ],
        about=growth.about,
        needed=growth.bytes_to_write,
        what="the grown checkpoint",
        check=growth.source.require_sound,
    )


def _write(
    growth: GrownState, tensor_rank: int, data_rank: int, folder: Path, crew: WriteContext
) -> dict[str, object]:
    return growth.write_rank(folder, tensor_rank=tensor_rank, data_rank=data_rank, crew=crew)
