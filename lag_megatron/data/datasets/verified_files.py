"""What of prepared files was compared with its checksum before, so that a restart need not read it.

A file is known by its path, size, time of change and inode.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import xxhash

from lag_megatron.atomic_io import write_atomically
from lag_megatron.errors import DataError, LagError
from lag_megatron.small_files import read_json

# A file that has just been changed may change again without another time of change.
_SETTLED_NS = 2_000_000_000


class VerifiedFiles:
    """A folder that keeps which ranges of which files were found good.

    Args:
        folder: made when something is kept.
        writer: names the process among those that write at the same time, e.g. ``3-of-8``.
    """

    def __init__(self, folder: Path, *, writer: str) -> None:
        self._folder, self._writer = folder, writer

    def ranges(self, path: Path) -> set[str]:
        """The ranges of a file as it is now, as :func:`range_key` names them."""
        now, found = identity_of(path), set()
        for kept in self._place(path).glob("*.json"):
            try:
                values = read_json(kept, what="a list of verified ranges", error=DataError)
                if values["path"] == str(path.resolve()) and values["identity"] == now:
                    found |= {str(key) for key in values["ranges"]}
            except (LagError, KeyError, TypeError):  # then the file is read again
                continue
        return found

    def keep(self, path: Path, ranges: Iterable[str], *, identity: list[int]) -> None:
        """Add ranges that were found good while the file was ``identity``.

        A folder that cannot be written is no error: the next start reads the file again.
        """
        settled = identity and time.time_ns() - identity[1] >= _SETTLED_NS
        if not settled or identity_of(path) != identity:
            return
        kept = {
            "path": str(path.resolve()),
            "identity": identity,
            "ranges": sorted(self.ranges(path) | set(ranges)),
        }
        place = self._place(path)
        try:
            place.mkdir(parents=True, exist_ok=True)
            write_atomically(place / f"{self._writer}.json", json.dumps(kept))
        except OSError:
            return

    def _place(self, path: Path) -> Path:
        return self._folder / xxhash.xxh3_64_hexdigest(str(path.resolve()).encode())


def range_key(first: int, size: int, expected: str) -> str:
    """Names a range of a file with the checksum that it should have."""
    return f"{first}+{size}:{expected}"


def identity_of(path: Path) -> list[int]:
    """Bytes, time of change in nanoseconds and inode of a file; empty for a missing one."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ino]
