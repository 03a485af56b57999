"""Documents: where the text lies, found and hashed without holding it in memory."""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lag_megatron.config import DataConfig
from lag_megatron.errors import DataError

# A text file above the one size is cut into documents of the other.
_LONG_FILE = 1 << 18
_PIECE = 1 << 16
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Document:
    """A whole file, one line of a JSON-lines file, or a stretch of lines of a long text.

    Attributes:
        path: the file.
        line: number of the first line, from 1; 0 stands for the whole file.
        offset: first byte.
        size: bytes.
    """

    path: Path
    line: int = 0
    offset: int = 0
    size: int = 0

    @property
    def where(self) -> str:
        """``file`` or ``file:line``, for messages."""
        return f"{self.path}:{self.line}" if self.line else str(self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The documents that hold text, in a deterministic order.

    Attributes:
        documents: where each document lies.
        text_key: key of the text in JSON lines, None for whole files.
        content_hash: 32 hex digits over texts and order, whatever the files' names.
        bytes: bytes of text, in UTF-8.
        skipped_files: empty documents and, of the standard library, files that are not UTF-8.
    """

    documents: tuple[Document, ...]
    text_key: str | None
    content_hash: str
    bytes: int
    skipped_files: int

    def read(self, document: Document) -> str:
        """Return the text of one document.

        Raises:
            DataError: if the file has gone or was changed since the corpus was opened.
        """
        try:
            with document.path.open("rb") as stream:
                stream.seek(document.offset)
                data = stream.read(document.size if document.line else -1)
        except OSError as error:
            raise _unreadable(document.path, error) from error
        return _text_of(data, document, self.text_key)


def open_corpus(config: DataConfig) -> Corpus:
    """Find, check and hash every document of a source, reading each once.

    Raises:
        DataError: for paths that name nothing, files that cannot be read, text that is not UTF-8
            (passed over in the standard library), bad JSON lines, or no text at all.
    """
    text_key = config.text_key if config.source == "jsonl" else None
    digest = xxhash.xxh3_128()
    documents: list[Document] = []
    size = skipped = 0
    for document, data in _raw_documents(config):
        try:
            encoded = _text_of(data, document, text_key).encode()
        except DataError:
            if config.source != "stdlib":
                raise
            encoded = b""
        if not encoded:
            skipped += 1
            continue
        # The length keeps apart corpora that cut the same text into other documents.
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
        documents.append(document)
        size += len(encoded)
    if not documents:
        raise DataError(
            f"data.source {config.source!r}: no text found ({skipped} empty or unreadable "
            "documents). Expected UTF-8 text in at least two documents."
        )
    return Corpus(
        documents=tuple(documents),
        text_key=text_key,
        content_hash=digest.hexdigest(),
        bytes=size,
        skipped_files=skipped,
    )


def _raw_documents(config: DataConfig) -> Iterator[tuple[Document, bytes]]:
    """Each document with its undecoded bytes."""
    suffix = ".jsonl" if config.source == "jsonl" else ".txt"
    paths = _stdlib_files() if config.source == "stdlib" else _named_files(config.paths, suffix)
    for path in paths:
        try:
            if config.source == "jsonl":
                yield from _lines(path)
            elif config.source == "text" and path.stat().st_size > _LONG_FILE:
                yield from _pieces(path)
            else:
                yield Document(path), path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error


def _stdlib_files() -> list[Path]:
    """Every module of the running Python's standard library, sorted by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise DataError(
            f"data.source 'stdlib': no .py files under {root}, where this Python says that its "
            "standard library is. Use another Python, or data.source: text with data.paths."
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _named_files(paths: tuple[str, ...], suffix: str) -> list[Path]:
    """The files that paths, globs and folders name, in the order given and each once."""
    found: dict[Path, None] = {}
    for name in paths:
        path = Path(name).expanduser()
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = sorted(p for p in path.rglob(f"*{suffix}") if p.is_file())
        else:
            matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            matches = [p for p in matches if p.is_file()]
        if not matches:
            kind = f"a folder without *{suffix} files" if path.is_dir() else "no such file"
            raise DataError(
                f"data.paths: {name!r} is {kind} (seen from {Path.cwd()}). Expected an existing "
                f"file, a glob that matches files, or a folder that holds *{suffix} files."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _lines(path: Path) -> Iterator[tuple[Document, bytes]]:
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Document(path, line=number, offset=offset, size=len(line)), line
            offset += len(line)


def _pieces(path: Path) -> Iterator[tuple[Document, bytes]]:
    """A long text, cut at ends of lines: one file of a whole corpus can be shuffled and split."""
    first, offset, lines, held = 1, 0, [], 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            lines.append(line)
            held += len(line)
            if held >= _PIECE:
                yield Document(path, line=first, offset=offset, size=held), b"".join(lines)
                first, offset, lines, held = number + 1, offset + held, [], 0
    if lines:
        yield Document(path, line=first, offset=offset, size=held), b"".join(lines)


def _text_of(data: bytes, document: Document, text_key: str | None) -> str:
    """Decode one document.

    Raises:
        DataError: for what is not UTF-8, or not a JSON object with a string under the key.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{document.where}: not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}). "
            "Convert the file to UTF-8 or leave it out of data.paths."
        ) from None
    return text if text_key is None else _value_of(text, document, text_key)


def _value_of(line: str, document: Document, text_key: str) -> str:
    expected = f"Expected one JSON object a line, with a string under {text_key!r} (data.text_key)."
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{document.where}: not JSON: {error}. {expected}") from None
    if not isinstance(value, dict):
        raise DataError(f"{document.where}: got a {type(value).__name__}. {expected}")
    text = value.get(text_key)
    if not isinstance(text, str):
        got = f"{type(text).__name__} under {text_key!r}" if text_key in value else "no such key"
        raise DataError(f"{document.where}: got {got}. {expected}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{document.where}: half a surrogate pair in the text. Mend or remove it.")
    return text


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot read the file: {error.strerror}. Check data.paths.")
