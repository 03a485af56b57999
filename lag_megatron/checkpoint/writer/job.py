"""Writing a checkpoint in parts: several at a time, resumable, committed when all are there.

Everything is written into ``<target>.tmp`` and renamed at the end.  After a kill the same call
skips the parts that are on the disk and writes the others again.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lag_megatron.atomic_io import flush_to_disk
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.writer.context import ProgressFn, ThreadBuffers, WriteContext
from lag_megatron.checkpoint.writer.progress_log import WriteProgress
from lag_megatron.errors import CheckpointError, PlanError, write_failure
from lag_megatron.process.interrupts import deferred_interrupts
from lag_megatron.targets.file_lock import sole_writer
from lag_megatron.targets.overlap import require_apart

_POINTER_SECONDS = 60.0  # to wait for a writer of another tag
_FLUSHES = 8  # at a time: a file system flushes small files together


@dataclass(frozen=True, slots=True)
class Part:
    """Files that are written together.

    Attributes:
        name: unique among the parts of a checkpoint.
        write: writes the files into a folder and returns their manifest entries by name; it calls
            the context's functions for each piece and each finished file.
    """

    name: str
    write: Callable[[Path, WriteContext], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class WriteJob:
    """A checkpoint to write, and how it is committed.

    Raises PlanError when the target is the source, or within or around it.

    Attributes:
        target: the directory to write; it does not exist yet.
        source: the checkpoint that is read, which the target may not touch.
        parts: its files in groups that are written independently.
        metadata: entries of its manifest; an unfinished directory with others is not resumed.
        needed: bytes of all parts together.
        title: what is written, for messages.
        check: called in a thread beside the writing; nothing is committed when it raises.
        finish: called with the staging directory and the manifest entries of all parts; writes
            files that depend on them and returns their entries.
        beside: called with the target's folder after the commit and before the pointer is written;
            writes what loaders look for there, and is called again after a kill.
        pointer: the file beside the target that will name it; None for none.
        pointer_text: what the pointer holds; the target's name by default.
    """

    target: Path
    source: Path
    parts: Sequence[Part]
    metadata: Mapping[str, Any]
    needed: int
    title: str
    check: Callable[[], None]
    finish: Callable[[Path, Mapping[str, Any]], Mapping[str, Any]] = lambda folder, files: {}
    beside: Callable[[Path], None] = lambda folder: None
    pointer: str | None = manifest.LATEST
    pointer_text: str | None = None

    def __post_init__(self) -> None:
        require_apart(self.target, self.source)

    def was_committed(self) -> bool:
        """Whether an earlier run of the same job has committed the target.

        Raises:
            CheckpointError: if it has, but files are missing or cut short since.
        """
        if not manifest.is_committed(self.target):
            return False
        metadata = json.loads(json.dumps(_comparable(self.metadata)))  # as a manifest has it
        found = manifest.check_sizes(self.target)
        return all(found.get(key) == value for key, value in metadata.items())

    def point(self) -> None:
        """Write what lies beside the target, and then the pointer that names it."""
        self.beside(self.target.parent)
        if self.pointer is not None:
            manifest.point_latest(self.target, self.pointer, self.pointer_text)


def write(
    job: WriteJob,
    *,
    workers: int = 1,
    written: ProgressFn = lambda count: None,
    lock: bool = True,
) -> bool:
    """Write and commit a checkpoint, unless an earlier call has.

    Args:
        job: what to write.
        workers: parts at a time; each needs a few megabytes.
        written: called with the number of bytes after each piece, e.g. a progress bar's ``update``.
        lock: refuse a second writer of the target; see :mod:`lag_megatron.targets.file_lock`.

    Returns:
        whether anything was written.

    Raises:
        PlanError: when the target exists and is not this job's, or touches what it is made from.
        RunError: when another process writes the target, or its file system has no locks.
        CheckpointError: when the disk is too small or fails, or the check finds corruption; what
            was written is removed then.  After a kill it stays, and the same call resumes.
    """
    with sole_writer(job.target, lock=lock, error=CheckpointError):
        is_new = not job.target.exists()
        if is_new:
            _write_parts(job, workers, written)
        elif not job.was_committed():
            raise PlanError(f"{job.target}: exists already. Name another target or remove it.")
        _point(job, lock)  # also after an earlier call, which may have been killed before it
    return is_new


def _write_parts(job: WriteJob, workers: int, written: ProgressFn) -> None:
    staging = manifest.temporary(job.target)
    try:
        names = {part.name for part in job.parts}
        progress = WriteProgress.open(staging, _comparable(job.metadata), names)
        for entry in progress.entries().values():
            written(entry["size"])
        missing = job.needed - sum(entry["size"] for entry in progress.entries().values())
        manifest.require_space(staging, needed=max(0, missing), what=job.title)
        _write_missing(job, progress, workers, written)
        files = progress.entries()
        files |= job.finish(staging, files)
        # The names of files in directories; commit() flushes the staging directory.
        with deferred_interrupts() as interrupts, _pool(_FLUSHES) as disk:
            folders = filter(Path.is_dir, staging.rglob("*"))
            interrupts.wait_for([disk.submit(flush_to_disk, folder) for folder in folders])
        progress.close()
        manifest.commit(job.target, files=files, metadata=job.metadata, pointer=None)
    except OSError as error:
        manifest.remove_checkpoint(staging)
        reason, advice = write_failure(error)
        raise CheckpointError(
            f"{error.filename or job.target}: cannot write there: {reason} {advice}"
        ) from None
    except Exception:
        manifest.remove_checkpoint(staging)
        raise


def _point(job: WriteJob, lock: bool) -> None:
    """Write the pointer, which targets of other tags in the same folder share."""
    if job.pointer is None:
        return
    pointer = job.target.with_name(job.pointer)
    try:
        with sole_writer(pointer, lock=lock, timeout=_POINTER_SECONDS):
            job.point()
    except OSError as error:
        reason, advice = write_failure(error)
        name = Path(error.filename or pointer).name.removesuffix(".part")
        raise CheckpointError(
            f"{job.target}: is written, but {name} beside it is not: {reason} {advice}"
        ) from None


def _write_missing(
    job: WriteJob, progress: WriteProgress, workers: int, written: ProgressFn
) -> None:
    failed = threading.Event()

    def on_progress(count: int) -> None:
        if failed.is_set():
            raise _AnotherFailed
        written(count)

    with (
        deferred_interrupts() as interrupts,
        _single_threaded_torch(),
        _pool(_FLUSHES) as disk,
        _pool(1) as checker,
        _pool(workers) as pool,
    ):
        # Beside the writing, other threads verify the source's checksums, and flush the files of
        # finished parts and log them.
        logged: list[Future[None]] = []
        lock, buffers = threading.Lock(), ThreadBuffers()

        def write(part: Part) -> None:
            paths: list[Path] = []
            share_work = partial(_shared, pool, workers - 1)
            context = WriteContext(on_progress, paths.append, share_work, buffers)
            files = part.write(progress.folder, context)
            logged.append(disk.submit(mark_done, part.name, files, paths))

        def mark_done(name: str, files: Mapping[str, Any], paths: Sequence[Path]) -> None:
            for path in paths:
                flush_to_disk(path)
            with lock:
                progress.mark_done(name, files)

        missing = [part for part in job.parts if part.name not in progress.done]
        try:
            tasks = [checker.submit(job.check), *(pool.submit(write, part) for part in missing)]
            interrupts.wait_for(tasks)
        except BaseException:
            failed.set()  # the others end at their next piece
            raise
        interrupts.wait_for(logged)


@contextmanager
def _shared(pool: Executor, others: int, work: Callable[[], None]) -> Iterator[None]:
    """Meanwhile idle workers of the pool call ``work`` too: those with no part left to begin."""
    helpers: list[Future[None]] = []
    try:
        for _ in range(others):  # inside try: a pool that is being shut down refuses it
            helpers.append(pool.submit(work))
        yield
    finally:
        helpers = [helper for helper in helpers if not helper.cancel()]
        wait(helpers)
    for helper in helpers:
        helper.result()


class _AnotherFailed(Exception):
    """Ends a worker's part after another worker has failed."""


def _comparable(metadata: Mapping[str, Any]) -> Any:
    """The metadata that tells one checkpoint from another."""
    return {key: value for key, value in metadata.items() if key != "versions"}


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """A pool of threads; tasks that have not begun are dropped when the block ends."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Turn off torch's own threads, which cost more than they save on small pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
