"""From chunks of files to the texts of documents."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from lag_megatron.data.prepare.arrow import pyarrow, table_texts
from lag_megatron.data.prepare.sources import PIECE, Chunk, FileSlice, TextSource, unreadable
from lag_megatron.errors import DataError
from lag_megatron.small_files import parse_json

_BLOCK = 1 << 20


def read_chunk(source: TextSource, chunk: Chunk) -> Iterator[str]:
    """The text of each document, in order; empty for one that is to be passed over.

    Passed over are, of the standard library, files that are not UTF-8.

    Raises:
        DataError: naming file and line or row of what is not text, not UTF-8 or damaged.
    """
    for part in chunk:
        try:
            yield from _texts(source, part)
        except OSError as error:
            raise unreadable(part.path, error) from error


def _texts(source: TextSource, part: FileSlice) -> Iterator[str]:
    path = part.path
    if source.kind in ("parquet", "datasets"):
        yield from table_texts(
            path,
            kind=source.kind,
            column=source.text_key or "",
            start=part.start,
            stop=part.stop,
        )
    elif source.kind == "jsonl":
        yield from _json_texts(part, source.text_key or "")
    elif part.stop is not None:
        yield from _pieces(part)
    else:
        yield _whole_file(path, lenient=source.kind == "stdlib")


def _whole_file(path: Path, *, lenient: bool) -> str:
    try:
        return _decoded(path.read_bytes(), lambda: str(path))
    except DataError:
        if not lenient:
            raise
        return ""


def _pieces(part: FileSlice) -> Iterator[str]:
    """A long text, cut before lines: one file of a whole corpus can be shuffled and split.

    A document is the lines that begin within one window of ``PIECE`` bytes of the file.
    """
    path = part.path
    held: list[bytes] = []
    first = 0
    with path.open("rb") as stream:
        for offset, line in _lines(stream, part):
            if held and offset // PIECE != first // PIECE:
                yield _decoded(b"".join(held), _at(path, first))
                held = []
            first = first if held else offset
            held.append(line)
    if held:
        yield _decoded(b"".join(held), _at(path, first))


def _json_texts(part: FileSlice, text_key: str) -> Iterator[str]:
    path = part.path
    if path.suffix in (".gz", ".zst"):
        for number, line in _compressed_lines(path):
            if line.strip():
                yield _value_of(line, text_key, partial("{}:{}".format, path, number))
        return
    with path.open("rb") as stream:
        for offset, line in _lines(stream, part):
            if line.strip():
                yield _value_of(line, text_key, _at(path, offset))


def _lines(stream: IO[bytes], part: FileSlice) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line that begins in the part."""
    offset = part.start
    if offset:
        # A line that begins before the part belongs to the one before.
        stream.seek(offset - 1)
        offset += len(stream.readline()) - 1
    while part.stop is None or offset < part.stop:
        line = stream.readline()
        if not line:
            return
        yield offset, line
        offset += len(line)


def _compressed_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line of a ``.gz`` or ``.zst`` file."""
    number = 0
    try:
        with _decompressed(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path}: damaged or truncated after line {number}: {error}. Fetch or write it again."
        ) from error


def _decompressed(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    # Python's own zstd comes with 3.14, and the package zstandard ends a truncated file silently.
    stream = pyarrow(wanted_for=str(path)).input_stream(str(path), compression="zstd")
    return io.BufferedReader(stream, _BLOCK)


def _at(path: Path, offset: int) -> Callable[[], str]:
    """Says ``file:line`` of a byte, counting the lines before it only when asked."""

    def where() -> str:
        lines, left = 1, offset
        with path.open("rb") as stream:
            while left > 0:
                block = stream.read(min(left, _BLOCK))
                if not block:
                    break
                lines += block.count(b"\n")
                left -= len(block)
        return f"{path}:{lines}"

    return where


def _decoded(data: bytes, where: Callable[[], str]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where()}: not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}). "
            "Convert the file to UTF-8 or leave it out of the paths."
        ) from None


def _value_of(line: bytes, text_key: str, where: Callable[[], str]) -> str:
    expected = f"Expected one JSON object a line, with a string under {text_key!r} (text_key)."
    value = parse_json(
        _decoded(line, where),
        where=where,
        what=f"a JSON object with a string under {text_key!r} (text_key)",
        error=DataError,
        advice="Mend the line or remove it.",
    )
    text = value.get(text_key)
    if not isinstance(text, str):
        got = f"{type(text).__name__} under {text_key!r}" if text_key in value else "no such key"
        raise DataError(f"{where()}: got {got}. {expected}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where()}: half a surrogate pair in the text. Mend or remove it."
        ) from None
    return text
