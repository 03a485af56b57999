"""Comparing prepared data with the checksums that its preparation stored.

Before training: every file but the training tokens; these as a whole when they are small or when it
is asked for, else a sample of their blocks.  The other blocks follow in a process beside each rank.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lag_megatron.data.datasets import checksums
from lag_megatron.data.datasets.blended_dataset import Prepared
from lag_megatron.data.datasets.checksums import (
    BLOCKS,
    range_checksum,
    read_block_table,
    require_checksum,
)
from lag_megatron.data.datasets.prepared_dataset import PreparedData
from lag_megatron.data.datasets.verified_files import VerifiedFiles, identity_of, range_key
from lag_megatron.errors import DataError

SMALL_BYTES = 256 << 20  # up to so many, training tokens are compared as a whole
SAMPLE_BLOCKS = 4
_TRAINING = "train.bin"


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a file, and the checksum that they should have."""

    path: Path
    first: int
    size: int
    expected: str
    is_whole: bool

    @property
    def key(self) -> str:
        """Its name among the verified ones."""
        return range_key(self.first, self.size, self.expected)

    def require(self, got: str) -> None:
        """Compare a checksum.

        Raises:
            DataError: with the file, the block, both checksums and what to do.
        """
        where = "" if self.is_whole else f"bytes {self.first:,} to {self.first + self.size:,}: "
        require_checksum(self.path, got=got, expected=self.expected, where=where)


class DataVerification:
    """One rank's share of comparing the data.

    Args:
        data: as it was opened.
        everything: compare all of it before training.
        rank: of this process.
        size: number of ranks, each of which takes a share.
        cache: folder that keeps what was found good.

    Attributes:
        total: bytes of all files, all ranks together.
        uncompared: training tokens that only a whole-file checksum is known of, and not compared.

    Raises:
        DataError: if a table of blocks is damaged.
    """

    def __init__(
        self, data: Prepared, *, everything: bool, rank: int, size: int, cache: Path
    ) -> None:
        first: list[Range] = []
        later: list[Range] = []
        self.total, self.uncompared = 0, list[Path]()
        for source in data.sources:
            self.total += sum(count for count, _ in source.data.files.values())
            for part, is_first in _ranges(source.data, everything=everything):
                (first if is_first else later).append(part)
            self.uncompared += _uncompared(source.data, everything=everything)
        self._first, self._later = first[rank::size], later[rank::size]
        self._verified = VerifiedFiles(cache, writer=f"{rank}-of-{size}")
        self._problem: DataError | None = None
        self.compared = 0
        self._process: subprocess.Popen[str] | None = None
        self._follower: threading.Thread | None = None

    def compare_first(self) -> None:
        """Compare what has to be known before training.

        Raises:
            DataError: for the first file that was changed.
        """
        for part in self._unknown(self._first):
            identity = identity_of(part.path)
            part.require(range_checksum(part.path, first=part.first, size=part.size))
            self._count(part, identity)

    def compare_later(self, on_change: Callable[[str], object]) -> None:
        """Start to compare the rest at idle priority; returns at once.

        Args:
            on_change: called with a reason, from a thread, if a block was changed;
                ``require_sound`` raises from then on.
        """
        parts = list(self._unknown(self._later))
        if not parts:
            return
        root = str(Path(__file__).resolve().parents[3])
        self._process = subprocess.Popen(
            [sys.executable, "-P", checksums.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        self._follower = threading.Thread(target=self._follow, args=(parts, on_change), daemon=True)
        self._follower.start()

    def require_sound(self) -> None:
        """Raises ``DataError`` if a block was found to be changed."""
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """End the process; what it has compared is kept."""
        if self._process is not None and self._follower is not None:
            self._process.kill()
            self._follower.join()

    def _unknown(self, parts: list[Range]) -> Iterator[Range]:
        """The parts that were not found good before; the others are counted."""
        known: dict[Path, set[str]] = {}
        for part in parts:
            if part.path not in known:
                known[part.path] = self._verified.ranges(part.path)
            if part.key in known[part.path]:
                self.compared += part.size
            else:
                yield part

    def _follow(self, parts: list[Range], on_change: Callable[[str], object]) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        identities = {part.path: identity_of(part.path) for part in parts}
        job = [(str(part.path), part.first, part.size) for part in parts]
        with process:
            try:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                for part, line in zip(parts, process.stdout, strict=False):
                    part.require(line.strip())
                    self._count(part, identities[part.path])
            except BrokenPipeError:  # it was killed: the report says how much was compared
                return
            except DataError as error:
                process.kill()
                self._problem = error
                on_change("prepared data was changed")

    def _count(self, part: Range, identity: list[int]) -> None:
        self.compared += part.size
        self._verified.keep(part.path, [part.key], identity=identity)


def _ranges(data: PreparedData, *, everything: bool) -> Iterator[tuple[Range, bool]]:
    """What is compared of a folder, and whether before training."""
    for name, (size, expected) in data.files.items():
        path = data.folder / name
        if name != _TRAINING or size <= SMALL_BYTES or (everything and BLOCKS not in data.files):
            yield Range(path, 0, size, expected, is_whole=True), True
        elif BLOCKS in data.files:
            table = data.folder / BLOCKS
            bytes_, sums = read_block_table(table, expected=data.files[BLOCKS][1], size=size)
            sample = {len(sums) * i // SAMPLE_BLOCKS for i in range(SAMPLE_BLOCKS)}
            for number, expected_block in enumerate(sums):
                first = number * bytes_
                part = Range(path, first, min(bytes_, size - first), expected_block, False)
                yield part, everything or number in sample


def _uncompared(data: PreparedData, *, everything: bool) -> list[Path]:
    size, _ = data.files.get(_TRAINING, (0, ""))
    is_whole = everything or size <= SMALL_BYTES or BLOCKS in data.files
    return [] if is_whole else [data.folder / _TRAINING]
