"""Tables of text: Parquet, and Arrow as ``datasets`` saves it, read with pyarrow."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lag_megatron.errors import DataError


def pyarrow(module: str = "pyarrow", *, wanted_for: str) -> Any:
    """Import pyarrow or a part of it, which the extra ``data`` brings.

    Raises:
        DataError: if it is not installed, naming the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{wanted_for}: reading it needs pyarrow, which is not installed. "
            "Run: pip install 'lag_megatron[data]'"
        ) from None


def table_parts(path: Path, *, kind: str, column: str) -> list[int]:
    """Bytes of each row group (Parquet) or record batch (Arrow); no text is read.

    Raises:
        DataError: if the file is no such table, or has no column of text under that name.
    """
    with _explained(path, kind):
        table = _open(path, kind)
        _require_text(path, table.schema, column)
        return table.sizes()


def table_texts(
    path: Path, *, kind: str, column: str, start: int, stop: int | None
) -> Iterator[str]:
    """The texts of row groups or record batches ``start`` to ``stop``.

    Raises:
        DataError: naming the row (from 1) that holds no text or text that is not UTF-8.
    """
    with _explained(path, kind):
        table = _open(path, kind)
        for row, values in table.columns(column, start, stop):
            yield from _texts_of(path, column, values, row)


@contextlib.contextmanager
def _explained(path: Path, kind: str) -> Iterator[None]:
    """Raise pyarrow's errors about a file as :class:`DataError`."""
    arrow = pyarrow(wanted_for=str(path))
    try:
        yield
    except (OSError, arrow.ArrowException) as error:
        form = "Parquet" if kind == "parquet" else "Arrow"
        raise DataError(
            f"{path}: cannot be read as {form}: {error}. It may be truncated; fetch or write it "
            "again."
        ) from error


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._file = pyarrow("pyarrow.parquet", wanted_for=str(path)).ParquetFile(
            path, memory_map=True
        )
        self.schema = self._file.schema_arrow

    def sizes(self) -> list[int]:
        about = self._file.metadata
        return [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]

    def columns(self, name: str, start: int, stop: int | None) -> Iterator[tuple[int, Any]]:
        """Columns of text, each with the number of its first row."""
        about = self._file.metadata
        row = sum(about.row_group(i).num_rows for i in range(start))
        groups = list(range(about.num_row_groups))[start:stop]
        for batch in self._file.iter_batches(row_groups=groups, columns=[name], batch_size=1024):
            yield row, batch.column(0)
            row += len(batch)


class _Arrow:
    def __init__(self, path: Path) -> None:
        arrow = pyarrow(wanted_for=str(path))
        ipc = pyarrow("pyarrow.ipc", wanted_for=str(path))
        self._file = arrow.memory_map(str(path))
        try:
            reader = ipc.open_stream(self._file)
            self._batches = iter(reader)
        except arrow.ArrowInvalid:  # Arrow's other form, with an index at the end
            self._file.seek(0)
            reader = ipc.open_file(self._file)
            self._batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        self.schema = reader.schema

    def sizes(self) -> list[int]:
        return [batch.nbytes for batch in self._batches]

    def columns(self, name: str, start: int, stop: int | None) -> Iterator[tuple[int, Any]]:
        """Columns of text, each with the number of its first row."""
        row = 0
        for number, batch in enumerate(self._batches):
            if stop is not None and number >= stop:
                return
            if number >= start:
                yield row, batch.column(name)
            row += len(batch)


def _open(path: Path, kind: str) -> _Parquet | _Arrow:
    return _Parquet(path) if kind == "parquet" else _Arrow(path)


def _require_text(path: Path, schema: Any, column: str) -> None:
    types = pyarrow("pyarrow.types", wanted_for=str(path))
    expected = f"Expected a column of strings named {column!r} (text_key)."
    if column not in schema.names:
        raise DataError(f"{path}: has the columns {', '.join(schema.names)}. {expected}")
    kind = schema.field(column).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(values) or types.is_large_string(values)):
        raise DataError(f"{path}: the column {column!r} holds {kind}. {expected}")


def _texts_of(path: Path, column: str, values: Any, first: int) -> Iterator[str]:
    for row, value in enumerate(values, start=first + 1):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: row {row}: not UTF-8: {error}. Mend or remove it.") from None
        if text is None:
            raise DataError(
                f"{path}: row {row}: nothing under {column!r}. Expected a string; remove the row, "
                "or give it an empty one."
            )
        yield text
