"""The functions that a program imports: ``import lag_megatron as lag``.

They take and return paths and plain values.  Each raises a :class:`lag_megatron.errors.LagError`
(``lag.UserError``) for what a user can mend, and never ends the process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from lag_megatron.checkpoint.inspect import inspect_checkpoint
from lag_megatron.checkpoint.open import detect, open_checkpoint, resolve_checkpoint
from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.state.source import CheckpointSource, UnshardedCheckpoint
from lag_megatron.checkpoint.writer.job import write
from lag_megatron.checkpoint.writer.progress_bar import progress_bar
from lag_megatron.checkpoint.zero.header import resolve_tag
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config.schema.ranges import MAX_WORKERS, require_whole
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.growth.apply.conversion import Conversion, Format
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.apply.grown_state import GrownState, retarget
from lag_megatron.growth.apply.verify import differences
from lag_megatron.growth.plan import GrowthPlan

PathLike = str | Path
Precision = Literal["fp32", "bf16", "fp16"]
Progress = Callable[[int], object]


class Ranks(TypedDict, total=False):
    """How a checkpoint is spread over ranks; what is left out is as in the source.

    Attributes:
        world_size: ranks in all.
        tensor_parallel: ranks that share a layer's tensors.
        zero_stage: 0 to 3.
        precision: of the weights that the forward pass uses.
    """

    world_size: int
    tensor_parallel: int
    zero_stage: int
    precision: Precision


class WriteOptions(Ranks, total=False):
    """How a target is written, and for which ranks: :class:`Ranks`.

    Attributes:
        workers: files that are written at a time; 4 by default.
        progress: called with the number of bytes after each piece, from several threads; by
            default a bar is shown on a terminal.
        lock: refuse to write what another process is writing; False for file systems without locks.
        allow_nonfinite: go on where values of the source are NaN or infinite.
    """

    workers: int
    progress: Progress
    lock: bool
    allow_nonfinite: bool


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint holds, and what is wrong with it.

    Where it cannot be read, only ``path``, ``format`` and ``problems`` are known.

    Attributes:
        path: its own directory.
        format: ``zero``, ``universal``, ``megatron``, ``dcp``, ``megatron_legacy`` or ``hf``.
        step: optimizer steps taken; None where it is not recorded.
        layers: number of layers.
        parameters: number of elements of all parameters.
        topology: ``precision``, ``data_parallel``, ``tensor_parallel``, ... of the ranks that
            wrote it, as far as they are recorded.
        optimizer: hyper-parameters by parameter group.
        history: the growth plans that led to it, the oldest first.
        problems: why it cannot be used; empty for a sound checkpoint.
    """

    path: Path
    format: str
    step: int | None = None
    layers: int | None = None
    parameters: int | None = None
    topology: dict[str, Any]
    optimizer: list[dict[str, Any]]
    history: list[dict[str, Any]]
    problems: list[str]


def inspect(checkpoint: PathLike, *, verify: bool = False) -> CheckpointInfo:
    """Say what a checkpoint of any format holds.

    Args:
        checkpoint: its directory, or one with a pointer file to it.
        verify: read all files and compare them with their checksums.

    Raises:
        CheckpointError: if there is no checkpoint; one that is damaged has ``problems``.
    """
    path = resolve_checkpoint(Path(checkpoint))
    kind = detect(path)
    facts = inspect_checkpoint(path, verify=verify)
    return CheckpointInfo(
        path=path,
        format=kind,
        step=facts.get("step"),
        layers=facts.get("layers"),
        parameters=facts.get("parameters"),
        topology=facts.get("topology", {}),
        optimizer=facts.get("optimizer", []),
        history=facts.get("growth_history", []),
        problems=facts["problems"],
    )


def grow(
    source: PathLike,
    target: PathLike,
    plan: GrowthPlan | None = None,
    **options: Unpack[WriteOptions],
) -> Path:
    """Grow a ZeRO checkpoint shard by shard, or move it to another number of ranks.

    Args:
        source: a tag directory, or one with a file ``latest``; never changed.
        target: gets a directory named like the source's tag, and a file ``latest``.
        plan: the growth; without one the model stays as it is.
        options: ``world_size``, ``zero_stage``, ``workers``, ...: see :class:`Ranks` and
            :class:`WriteOptions`.

    Returns:
        the directory that was written; ``engine.load_checkpoint(target)`` takes it.

    Raises:
        PlanError: if the plan or the ranks do not fit the checkpoint, or the target exists.
        RunError: if another process writes the target, or its file system has no locks.
        CheckpointError: if the source is damaged, has values that are not finite, or the disk is
            too small.
    """
    workers = _workers(options)
    opened = ZeroCheckpoint.open(resolve_tag(Path(source)))
    plan = plan or GrowthPlan.for_source(opened, operator="identity")
    topology = _topology(opened, options)
    written = Path(target) / opened.path.resolve().name
    size = GrownState(opened, plan, topology).bytes_to_write
    with _reported(options.get("progress"), size) as count:
        grow_checkpoint(
            opened.path,
            written,
            plan,
            topology=topology,
            workers=workers,
            written=count,
            lock=options.get("lock", True),
            allow_nonfinite=options.get("allow_nonfinite", False),
        )
    return written


def convert(
    source: PathLike,
    target: PathLike,
    *,
    to: Format,
    plan: GrowthPlan | None = None,
    vocab_size: int | None = None,
    weights_only: bool = False,
    dtype: Precision = "fp32",
    verify: bool = False,
    **options: Unpack[WriteOptions],
) -> Path:
    """Take a checkpoint from one format to another, growing it on the way if there is a plan.

    Args:
        source: its directory, or one with a pointer file to it; of any format.
        target: gets a tag directory; with ``to="hf"`` it is the directory.
        to: ``zero``, ``universal``, ``megatron`` or ``hf``.
        plan: the growth; without one the model stays as it is.
        vocab_size: rows of the vocabulary: from transformers with padding, to it without.
        weights_only: leave out the optimizer states of a torch_dist checkpoint.
        dtype: of the weights of ``hf``.
        verify: compare every tensor of the target with the source afterwards.
        options: as those of :func:`grow`; of the training that will load it.  The ZeRO stage is 1
            where the source has none.

    Returns:
        the directory that was written, or was there already from the same conversion.

    Raises:
        PlanError: if the plan or the ranks do not fit the checkpoint.
        RunError: if another process writes the target, or its file system has no locks.
        CheckpointError: if the source is damaged or has values that are not finite, or ``verify``
            finds a difference.
    """
    workers = _workers(options)
    opened = open_checkpoint(Path(source), vocab_size=vocab_size, weights_only=weights_only)
    conversion = _conversion(opened, plan, options, to=to, dtype=dtype, vocabulary=vocab_size)
    written = conversion.target_dir(Path(target))
    with _reported(options.get("progress"), (job := conversion.job(written)).needed) as count:
        write(job, workers=workers, written=count, lock=options.get("lock", True))
    if verify and (found := list(differences(conversion, written))):
        raise CheckpointError(f"{written}: differs from {source}: {'; '.join(found[:3])}.")
    return written


def _conversion(
    source: CheckpointSource, plan: GrowthPlan | None, options: WriteOptions, **settings: Any
) -> Conversion:
    if isinstance(source, UnshardedCheckpoint):
        options.setdefault("zero_stage", 1)  # there is no stage to keep
    plan = plan or GrowthPlan.for_source(source, operator="identity")
    return Conversion(
        source=source,
        plan=plan,
        topology=_topology(source, options),
        allow_nonfinite=options.get("allow_nonfinite", False),
        **settings,
    )


def _topology(source: CheckpointSource, ranks: Ranks) -> Topology:
    return retarget(
        source.topology,
        world_size=ranks.get("world_size"),
        tensor_size=ranks.get("tensor_parallel"),
        zero_stage=ranks.get("zero_stage"),
        precision=ranks.get("precision"),
    )


def _workers(options: WriteOptions) -> int:
    if unknown := sorted(set(options) - WriteOptions.__optional_keys__):
        raise TypeError(f"unexpected options: {', '.join(unknown)}")
    workers = options.get("workers", 4)
    require_whole(workers, "workers", error=PlanError, least=1, most=MAX_WORKERS)
    return workers


@contextmanager
def _reported(progress: Progress | None, size: int) -> Iterator[Progress]:
    """The caller's callback, or a bar of ``size`` bytes on a terminal."""
    if progress is not None:
        yield progress
        return
    with progress_bar(size) as add:
        yield add
