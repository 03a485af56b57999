"""The files of a text source, in chunks that one worker reads at a time."""

import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lag_megatron.config.schema.data import DataConfig, SourceConfig
from lag_megatron.data.prepare.arrow import table_parts
from lag_megatron.errors import DataError
from lag_megatron.small_files import read_json

CHUNK_BYTES = 32 << 20
# A text file above the one size is cut into documents of about the other.
LONG_FILE = 1 << 18
PIECE = 1 << 16
_SUFFIXES = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "datasets": (".arrow",),
}
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A part of a file: bytes of text, row groups of Parquet, record batches of Arrow.

    Attributes:
        path: the file.
        start: the first.
        stop: the one after the last; None is the whole file.
    """

    path: Path
    start: int = 0
    stop: int | None = None


Chunk = tuple[FileSlice, ...]


@dataclass(frozen=True, slots=True)
class TextSource:
    """A kind of source and its paths: what a worker needs besides a chunk to read it.

    Attributes:
        kind: ``stdlib``, ``text``, ``jsonl``, ``parquet`` or ``datasets``.
        paths: files, globs and folders.
        text_key: key or column of the text, None for plain text.
        where: dotted path of its settings, for messages.
    """

    kind: str
    paths: tuple[str, ...]
    text_key: str | None
    where: str = "data"

    @staticmethod
    def of(config: DataConfig | SourceConfig) -> "TextSource":
        """The source that a configuration names, alone or in a mixture."""
        plain = config.source in ("stdlib", "text")
        where = f"data.mixture.{config.name}" if isinstance(config, SourceConfig) else "data"
        return TextSource(config.source, config.paths, None if plain else config.text_key, where)

    @property
    def name(self) -> str:
        """Its name in a mixture, or ``data``."""
        return self.where.removeprefix("data.mixture.")

    def chunks(self, size: int = CHUNK_BYTES) -> list[Chunk]:
        """All of the source, in an order that the paths and files' names alone decide.

        Documents do not depend on ``size``, the bytes of a chunk at about which it is closed.

        Raises:
            DataError: for paths that name nothing, and files that cannot be opened.
        """
        return list(_packed(self._parts(size), size))

    def files(self) -> list[Path]:
        """The files, each once.

        Raises:
            DataError: for paths that name nothing.
        """
        if self.kind == "stdlib":
            return _stdlib_files()
        found: dict[Path, None] = {}
        for name in self.paths:
            found.update(dict.fromkeys(self._matches(name)))
        return list(found)

    def _matches(self, name: str) -> list[Path]:
        path, suffixes = Path(name).expanduser(), _SUFFIXES[self.kind]
        if path.is_file():
            return [path]
        if path.is_dir():
            if self.kind == "datasets":
                return _saved_dataset(path, self.where)
            matches = sorted(p for p in path.rglob("*") if p.name.endswith(suffixes))
        else:
            matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        matches = [p for p in matches if p.is_file()]
        if not matches:
            wanted = ", ".join(f"*{suffix}" for suffix in suffixes)
            kind = f"a folder without {wanted} files" if path.is_dir() else "no such file"
            raise DataError(
                f"{self.where}.paths: {name!r} is {kind} (seen from {Path.cwd()}). Expected an "
                f"existing file, a glob that matches files, or a folder that holds {wanted} files."
            )
        return matches

    def _parts(self, size: int) -> Iterator[tuple[FileSlice, int]]:
        """Parts of files, each with about how many bytes it has."""
        aligned = max(PIECE, size // PIECE * PIECE)
        for path in self.files():
            try:
                length = path.stat().st_size
            except OSError as error:
                raise unreadable(path, error) from error
            if self.kind in ("parquet", "datasets"):
                sizes = table_parts(path, kind=self.kind, column=self.text_key or "")
                for start, stop, held in _runs(sizes, size):
                    yield FileSlice(path, start, stop), held
            elif self._can_be_cut(path) and length > LONG_FILE:
                for start in range(0, length, aligned):
                    stop = min(start + aligned, length)
                    yield FileSlice(path, start, stop), stop - start
            else:
                yield FileSlice(path), length

    def _can_be_cut(self, path: Path) -> bool:
        return self.kind == "text" or (self.kind == "jsonl" and path.suffix not in (".gz", ".zst"))


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that cannot be read."""
    return DataError(
        f"{path}: cannot read the file: {error.strerror or error}. Check that it is there, and "
        "that this user may read it."
    )


def _packed(parts: Iterable[tuple[FileSlice, int]], size: int) -> Iterator[Chunk]:
    """Many small files make one chunk."""
    held: list[FileSlice] = []
    total = 0
    for part, length in parts:
        if held and total + length > size:
            yield tuple(held)
            held, total = [], 0
        held.append(part)
        total += length
    if held:
        yield tuple(held)


def _runs(sizes: Sequence[int], size: int) -> Iterator[tuple[int, int, int]]:
    """Neighbouring parts of a table, joined up to a size: first, one after the last, bytes."""
    first = held = 0
    for number, length in enumerate(sizes):
        if held and held + length > size:
            yield first, number, held
            first, held = number, 0
        held += length
    if first < len(sizes):
        yield first, len(sizes), held


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


def _saved_dataset(folder: Path, where: str) -> list[Path]:
    """The Arrow files of a folder that ``datasets``' ``save_to_disk`` wrote, in its order.

    They are read with Arrow itself: the rows are all in them, since ``save_to_disk`` writes out
    selections and shuffles.
    """
    expected = "Expected a folder that Dataset.save_to_disk wrote, with a state.json."
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        raise DataError(
            f"{where}.paths: {folder} holds several splits ({names}). Name one, as {folder}/SPLIT."
        )
    file = folder / "state.json"
    if not file.exists():
        raise DataError(f"{where}.paths: {folder} has no state.json. {expected}")
    state = read_json(
        file, what="the state of a saved dataset", error=DataError, advice="Save the dataset again."
    )
    try:
        files = [folder / item["filename"] for item in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: cannot be read: {error!r}. {expected}") from None
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise DataError(
            f"{where}.paths: {folder} lacks {', '.join(missing) or 'any data file'}, which its "
            f"state.json names. Save the dataset again."
        )
    return files
