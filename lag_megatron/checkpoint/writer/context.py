"""What a caller gives to the functions that write files: progress, flushing, threads, buffers."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lag_megatron.atomic_io import flush_to_disk
from lag_megatron.checkpoint.writer.pieces import PIECE_BYTES

_PIECES_PER_THREAD = 2  # one is made while the other waits to be hashed
# Most bytes of a thread's buffers, where no matrix is transposed.
BUFFER_BYTES = _PIECES_PER_THREAD * 2 * PIECE_BYTES

ProgressFn = Callable[[int], object]
FlushFn = Callable[[Path], object]


class ThreadBuffers(threading.local):
    """A thread's buffers by purpose, one set for each piece that it may have unfinished.

    Kept for several files: allocating fresh pages takes longer than filling a small file.
    """

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = [{} for _ in range(_PIECES_PER_THREAD)]


@dataclass(frozen=True, slots=True)
class WriteContext:
    """Callbacks and buffers of whoever has files written.

    Attributes:
        progress: called after each piece with its number of bytes.
        flush: called with each finished file, to bring it to the disk.
        share_work: a context manager around the writing of a long file.  Given a function, it lets
            idle threads call that function too, and waits for them when it exits.
        buffers: used for several files; without them each file allocates its own.
    """

    progress: ProgressFn = lambda count: None
    flush: FlushFn = flush_to_disk
    share_work: Callable[[Callable[[], None]], AbstractContextManager[object]] = nullcontext
    buffers: ThreadBuffers | None = None


DEFAULT_CONTEXT = WriteContext()
