"""Writing a checkpoint in parts: several at a time, resumable, committed when all are there.

After a kill the same call skips the parts that are on disk; anything else in the draft is written
again.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from lag_megatron.atomic_io import flush_to_disk
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.writer.file_writer import ProgressFn, ThreadBuffers, WriteContext
from lag_megatron.checkpoint.writer.progress_log import WriteProgress
from lag_megatron.errors import CheckpointError, PlanError

_FLUSHES = 8  # at a time: a file system brings small files to the disk together


@dataclass(frozen=True, slots=True)
class Part:
    """Files that are written together.

    Attributes:
        name: unique among the parts of a checkpoint.
        write: makes the files in a folder and returns their manifest entries by name; it tells how
            many bytes each piece had, which file is finished, and where others could help.
    """

    name: str
    write: Callable[[Path, WriteContext], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class WriteJob:
    """What is to be written, and how it is committed.

    Attributes:
        target: the directory to come; it does not exist.
        parts: of it.
        about: entries of its manifest; a draft with others is not gone on with.
        needed: bytes, all parts together.
        what: it is, for messages.
        check: called beside the writing; nothing is committed when it raises.
        finish: called when all parts are there, with their manifest entries; writes what speaks of
            them and returns its own.
        pointer: the file beside the target that will name it; None for none.
        says: what the pointer says; the target's name by default.
    """

    target: Path
    parts: Sequence[Part]
    about: Mapping[str, Any]
    needed: int
    what: str
    check: Callable[[], None]
    finish: Callable[[Path, Mapping[str, Any]], Mapping[str, Any]] = lambda folder, files: {}
    pointer: str | None = manifest.LATEST
    says: str | None = None

    def was_published(self) -> bool:
        """Whether the target is this order's result, made by an earlier run.

        Raises:
            CheckpointError: if it was, but files of it are gone or cut short since.
        """
        if not manifest.is_committed(self.target):
            return False
        about = json.loads(json.dumps(_comparable(self.about)))  # as it stands in a manifest
        found = manifest.check_sizes(self.target)
        return all(found.get(key) == value for key, value in about.items())

    def point(self) -> None:
        """Make the pointer name the target."""
        if self.pointer is not None:
            manifest.point_latest(self.target, self.pointer, self.says)


def write(order: WriteJob, *, workers: int = 1, written: ProgressFn = lambda count: None) -> bool:
    """Write and commit, unless an earlier call has; whether it had to.

    Args:
        order: what to do.
        workers: parts at a time; each needs a few megabytes.
        written: told the number of bytes after each piece, e.g. a progress bar's ``update``.

    Raises:
        PlanError: when the target exists and is another's.
        CheckpointError: when the disk is too small or fails, or the check finds damage; the draft
            is removed then.  After a kill or an interruption it stays, for the same call.
    """
    if order.target.exists():
        if not order.was_published():
            raise PlanError(f"{order.target}: exists already. Name another target or remove it.")
        order.point()  # killed between the two, or asked for twice
        return False
    _write_parts(order, workers, written)
    return True


def _write_parts(order: WriteJob, workers: int, written: ProgressFn) -> None:
    draft = manifest.temporary(order.target)
    try:
        names = {part.name for part in order.parts}
        record = WriteProgress.open(draft, _comparable(order.about), names)
        for entry in record.entries().values():
            written(entry["size"])
        missing = order.needed - sum(entry["size"] for entry in record.entries().values())
        manifest.require_space(draft, needed=max(0, missing), what=order.what)
        _write_missing(order, record, workers, written)
        files = record.entries()
        files |= order.finish(draft, files)
        with _pool(_FLUSHES) as disk:  # the names of files; those of the draft are published
            folders = filter(Path.is_dir, draft.rglob("*"))
            _require([disk.submit(flush_to_disk, folder) for folder in folders])
        record.close()
        manifest.commit(order.target, files=files, about=order.about, pointer=None)
    except OSError as error:
        manifest.remove_checkpoint(draft)
        raise CheckpointError(
            f"{error.filename or order.target}: cannot write there: {error.strerror or error}. "
            "Name another target."
        ) from None
    except Exception:
        manifest.remove_checkpoint(draft)
        raise
    try:
        order.point()
    except OSError as error:
        raise CheckpointError(
            f"{order.target}: is written, but {order.pointer} beside it is not: "
            f"{error.strerror or error}. Make room and run the same command again."
        ) from None


def _write_missing(
    order: WriteJob, record: WriteProgress, workers: int, written: ProgressFn
) -> None:
    failed = threading.Event()

    def told(count: int) -> None:
        if failed.is_set():
            raise _Abandoned
        written(count)

    with (
        _single_threaded_torch(),
        _pool(_FLUSHES) as disk,
        _pool(1) as checker,
        _pool(workers) as pool,
    ):
        # Beside the writing: the source is compared with its checksums, and the files of finished
        # parts go to the disk, and then into the record, while the next are made.
        noted: list[Future[None]] = []
        recording, rooms = threading.Lock(), ThreadBuffers()

        def write(part: Part) -> None:
            paths: list[Path] = []
            join = partial(_joined, pool, workers - 1)
            crew = WriteContext(told, paths.append, join, rooms)
            files = part.write(record.folder, crew)
            noted.append(disk.submit(note, part.name, files, paths))

        def note(name: str, files: Mapping[str, Any], paths: Sequence[Path]) -> None:
            for path in paths:
                flush_to_disk(path)
            with recording:
                record.note(name, files)

        missing = [part for part in order.parts if part.name not in record.done]
        try:
            _require([checker.submit(order.check), *(pool.submit(write, part) for part in missing)])
        except BaseException:
            failed.set()  # the others end at their next piece
            raise
        _require(noted)


def _require(tasks: Sequence[Future[None]]) -> None:
    """Wait until all have ended, and raise what the first that fails raises.

    A key may interrupt this.  Then Python's own ways to wait for tasks can leave a lock of theirs
    taken, at which the workers would stay for ever.
    """
    ended: SimpleQueue[Future[None]] = SimpleQueue()
    for task in tasks:
        task.add_done_callback(ended.put)
    for _ in tasks:
        ended.get().result()


@contextmanager
def _joined(pool: Executor, others: int, work: Callable[[], None]) -> Iterator[None]:
    """Workers of the pool that have no part left to begin do ``work`` as well, meanwhile."""
    helpers: list[Future[None]] = []
    try:
        for _ in range(others):  # here, since a pool that is shut down meanwhile takes none
            helpers.append(pool.submit(work))
        yield
    finally:
        helpers = [helper for helper in helpers if not helper.cancel()]
        wait(helpers)
    for helper in helpers:
        helper.result()


class _Abandoned(Exception):
    """Ends a worker after another one has failed."""


def _comparable(about: Mapping[str, Any]) -> Any:
    """What tells one checkpoint from another."""
    return {key: value for key, value in about.items() if key != "versions"}


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
