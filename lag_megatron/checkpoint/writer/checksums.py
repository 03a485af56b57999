"""What is behind the threads that fill a file: its checksums, and pages on their way to the disk.

Beside the checksum of all of it there is one of each state, where it holds several: who needs
masters alone then compares a third of a shard.
"""

import os
from collections.abc import Iterable
from typing import Any

import xxhash

from lag_megatron.checkpoint.storage.manifest import NO_STATE, STATES_APART
from lag_megatron.checkpoint.storage.page_cache import start_writeback

_WINDOW_BYTES = 1 << 24
_GAP_BYTES = 1 << 16


class ChecksumStream:
    """Goes along a file, front to back.

    Args:
        file: its descriptor.
        states: of all values that it holds.
    """

    def __init__(self, file: int, states: Iterable[str]) -> None:
        self._file = file
        self._sent = 0
        self._whole = xxhash.xxh3_128()
        found = sorted(set(states))
        names = [*found, NO_STATE] if len(found) > 1 else []
        self._apart: dict[str, Any] = {name: xxhash.xxh3_128() for name in names}
        self._runs: dict[str, list[list[int]]] = {name: [] for name in names}

    def hash(self, data: memoryview, begin: int, state: str = NO_STATE) -> None:
        """Go on with the bytes from ``begin`` on, which are values of a state, or none."""
        self._whole.update(data)
        end = begin + len(data)
        if self._apart:
            self._apart[state].update(data)
            runs = self._runs[state]
            if runs and runs[-1][1] == begin:
                runs[-1][1] = end
            else:
                runs.append([begin, end])
        if end - self._sent >= _WINDOW_BYTES:
            start_writeback(self._file, self._sent, end - self._sent)
            self._sent = end

    def hash_file(self, begin: int, end: int) -> None:
        """Go on with what stands there: an archive's own records, small tensors, columns."""
        while begin < end:
            data = os.pread(self._file, min(_GAP_BYTES, end - begin), begin)
            if not data:
                raise OSError(f"the file ended at byte {begin}, expected {end}")
            self.hash(memoryview(data), begin)
            begin += len(data)

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        found: dict[str, Any] = {
            "size": os.fstat(self._file).st_size,
            "xxh3_128": self._whole.hexdigest(),
        }
        if self._apart:
            found[STATES_APART] = {
                name: {"runs": self._runs[name], "xxh3_128": digest.hexdigest()}
                for name, digest in self._apart.items()
            }
        return found
