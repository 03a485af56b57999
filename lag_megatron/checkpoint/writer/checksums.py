"""The checksums of a file while it is written, front to back, and its way to the disk.

Beside the checksum of the whole file there is one of each state where it holds several: a reader
that needs masters alone then compares a third of a shard.
"""

import os
from collections.abc import Iterable
from typing import Any

import xxhash

from lag_megatron.checkpoint.storage.manifest import NO_STATE, STATES_APART
from lag_megatron.checkpoint.storage.page_cache import start_writeback

_WINDOW_BYTES = 1 << 24  # written back to the disk at a time
_READ_BYTES = 1 << 16


class ChecksumStream:
    """Hashes a file in order and starts the write-back of what is hashed.

    Args:
        file: its descriptor.
        states: of all values that it holds.
    """

    def __init__(self, file: int, states: Iterable[str]) -> None:
        self._file = file
        self._written_back = 0
        self._whole = xxhash.xxh3_128()
        found = sorted(set(states))
        names = [*found, NO_STATE] if len(found) > 1 else []
        self._by_state: dict[str, Any] = {name: xxhash.xxh3_128() for name in names}
        self._runs: dict[str, list[list[int]]] = {name: [] for name in names}

    def hash(self, data: memoryview, begin: int, state: str = NO_STATE) -> None:
        """Hash the next bytes, from offset ``begin`` on: values of ``state``, or of none."""
        self._whole.update(data)
        end = begin + len(data)
        if self._by_state:
            self._by_state[state].update(data)
            runs = self._runs[state]
            if runs and runs[-1][1] == begin:
                runs[-1][1] = end
            else:
                runs.append([begin, end])
        if end - self._written_back >= _WINDOW_BYTES:
            start_writeback(self._file, self._written_back, end - self._written_back)
            self._written_back = end

    def hash_file(self, begin: int, end: int) -> None:
        """Hash bytes that are read back: an archive's records, small tensors, columns.

        Raises:
            OSError: if the file is shorter.
        """
        while begin < end:
            data = os.pread(self._file, min(_READ_BYTES, end - begin), begin)
            if not data:
                raise OSError(f"the file ended at byte {begin}, expected {end}")
            self.hash(memoryview(data), begin)
            begin += len(data)

    @property
    def entry(self) -> dict[str, Any]:
        """The file's manifest entry."""
        found: dict[str, Any] = {
            "size": os.fstat(self._file).st_size,
            "xxh3_128": self._whole.hexdigest(),
        }
        if self._by_state:
            found[STATES_APART] = {
                name: {"runs": self._runs[name], "xxh3_128": digest.hexdigest()}
                for name, digest in self._by_state.items()
            }
        return found
