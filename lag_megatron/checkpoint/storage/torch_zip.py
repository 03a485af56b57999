"""The zip archives that ``torch.save`` writes: where tensors lie, and the CRC32 of each record.

No loader compares the CRC32.  It is 0, which means unknown, in files that were written with
``skip_data`` or without ``set_crc32_options``.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from lag_megatron.errors import CheckpointError

_CHUNK = 1 << 20
# What zipfile raises where a flipped bit hits its structures rather than the data.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,  # "encrypted", and NotImplementedError for unknown compression
    ValueError,
    struct.error,
    OSError,
)


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """The bytes of a file that hold a tensor's values; ``packed`` if they are compressed."""

    begin: int
    length: int
    packed: bool


def is_plain_pickle(path: Path) -> bool:
    """Whether torch wrote a file as it did before 1.6: a pickle without archive or checksums.

    DeepSpeed does so where ``checkpoint.checkpoint_serialization`` is false.
    """
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def damaged_records(path: Path, *, offset: int = 0, length: int | None = None) -> Iterator[str]:
    """Yield the names of the records that differ from their CRC32, in the file's order.

    Records without a checksum are not read, and a plain pickle has none.  Memory does not depend on
    the file's size.

    Args:
        path: a file that ``torch.save`` wrote.
        offset: where the archive begins, for files that hold several.
        length: bytes of the archive; without it, up to the end of the file.

    Raises:
        CheckpointError: if it is no zip archive, which a file that was cut short is not.
    """
    if not offset and path.is_file() and is_plain_pickle(path):
        return
    with _opened(path, offset, length) as archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as data:
                    while record.CRC and data.read(_CHUNK):
                        pass  # zipfile compares the checksum when it comes to the end
            except DAMAGE:
                yield record.filename


def has_checksums(path: Path, *, offset: int = 0, length: int | None = None) -> bool:
    """Whether every record that holds anything has a checksum.

    Raises:
        CheckpointError: as ``damaged_records``.
    """
    if not offset and path.is_file() and is_plain_pickle(path):
        return False
    with _opened(path, offset, length) as archive:
        return all(record.CRC for record in archive.infolist() if record.file_size)


def tensor_records(
    path: Path, *, offset: int = 0, length: int | None = None
) -> Iterator[ZipRecord]:
    """Where the values of each tensor of an archive lie; tensors without values are left out.

    Raises:
        CheckpointError: as ``damaged_records``.
    """
    with _opened(path, offset, length) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if "/data/" in info.filename and info.file_size:
                # The local header ends with two lengths, then the name and the padding.
                file.seek(offset + info.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                begin = offset + info.header_offset + 30 + name + extra
                yield ZipRecord(
                    begin, info.file_size, packed=info.compress_type != zipfile.ZIP_STORED
                )


class _View(io.RawIOBase):
    """A part of a file, seen as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position in the part."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position in the part."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(f"no position {base + offset}")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """At most ``size`` bytes, none beyond the part."""
        rest = max(self._length - self._at, 0)
        self._file.seek(self._offset + self._at)
        data = self._file.read(rest if size is None or size < 0 else min(size, rest))
        self._at += len(data)
        return data


@contextmanager
def _opened(path: Path, offset: int, length: int | None) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: this file of the checkpoint is missing. Restore it, or use another tag."
        )
    with path.open("rb") as file:
        rest = max(path.stat().st_size - offset, 0)
        view = _View(file, offset, rest if length is None else min(length, rest))
        try:
            archive = zipfile.ZipFile(cast(BinaryIO, view))
        except DAMAGE as error:
            where = f" at byte {offset}" if offset else ""
            raise CheckpointError(
                f"{path}: no zip archive{where}, which is what torch.save writes ({error}). "
                f"Damaged or cut short ({path.stat().st_size} bytes): restore it from a copy."
            ) from None
        with archive:
            yield archive
