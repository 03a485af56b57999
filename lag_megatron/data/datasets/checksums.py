"""Checksums of prepared files: of each whole file, and of the blocks of the training tokens.

Every checksum is a 128-bit xxh3 as 32 hex digits.  Run as a program (by its path, so that nothing
large is imported), it computes those of the ranges that it is sent, at idle priority.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lag_megatron.errors import DataError
from lag_megatron.small_files import parse_json, read_json

# Large enough that a block is read at the disk's rate and a terabyte has no more than 16,000 of
# them; small enough that four are no more than a small file, and that one names where damage is.
BLOCK_BYTES = 64 << 20
BLOCKS = "train.blocks.json"
_READ_BYTES = 8 << 20


def checksum(path: Path) -> str:
    """Of a whole file.

    Raises:
        DataError: if the file cannot be read.
    """
    return range_checksum(path, first=0, size=None)


def range_checksum(path: Path, *, first: int, size: int | None) -> str:
    """Of ``size`` bytes of a file from byte ``first`` on; to the file's end where it is None.

    Raises:
        DataError: if the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    for part in _parts(path, first, size):
        digest.update(part)
    return digest.hexdigest()


def block_table(path: Path, *, block_bytes: int = BLOCK_BYTES) -> str:
    """The checksums of all blocks of a file, as the JSON that ``train.blocks.json`` holds.

    Raises:
        DataError: if the file cannot be read.
    """
    starts = range(0, path.stat().st_size, block_bytes)
    sums = [range_checksum(path, first=first, size=block_bytes) for first in starts]
    return json.dumps({"block_bytes": block_bytes, "checksums": sums}, indent=0) + "\n"


def read_block_table(path: Path, *, expected: str, size: int) -> tuple[int, list[str]]:
    """Bytes of a block and the checksum of each block of a file of ``size`` bytes.

    Args:
        path: of the table.
        expected: the table's own checksum.
        size: of the file that it describes, in bytes.

    Raises:
        DataError: if the table is not the one that was written.
    """
    require_checksum(path, got=checksum(path), expected=expected)
    values = read_json(path, what="a table of checksums", error=DataError)
    try:
        block_bytes, sums = int(values["block_bytes"]), [str(s) for s in values["checksums"]]
        if block_bytes < 1 or len(sums) != -(-size // block_bytes):
            raise ValueError(f"{len(sums)} blocks of {block_bytes} bytes for {size} bytes")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as a table of checksums: {error}. "
            f"Delete {path.parent} and prepare it again."
        ) from None
    return block_bytes, sums


def require_checksum(path: Path, *, got: str, expected: str, where: str = "") -> None:
    """Compare a checksum with the one that was stored.

    Raises:
        DataError: with the file, ``where`` in it, and both checksums, if they differ.
    """
    if got != expected:
        raise DataError(
            f"{path}: {where}its bytes are not those that were written (xxh3 {got}, expected "
            f"{expected}). Restore the file, or delete {path.parent} and prepare it again."
        )


def _parts(path: Path, first: int, size: int | None) -> Iterator[memoryview]:
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(first)
            left = size
            while left is None or left > 0:
                wanted = _READ_BYTES if left is None else min(left, _READ_BYTES)
                count = stream.readinto(view[:wanted])
                if not count:
                    return
                left = None if left is None else left - count
                yield view[:count]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def main() -> None:
    """Read a JSON list of (path, first byte, bytes) and print the checksum of each, in order.

    Nothing is printed after a range that cannot be read.  It ends when its parent has ended.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # the disk's idle class follows
    parent = os.getppid()
    job = parse_json(
        sys.stdin.readline(), where="stdin", what="a list of ranges", error=DataError, shape=list
    )
    for path, first, size in job:
        if os.getppid() != parent:
            return
        print(range_checksum(Path(path), first=first, size=size), flush=True)


if __name__ == "__main__":
    main()
