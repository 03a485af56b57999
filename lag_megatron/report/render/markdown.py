"""Blocks as Markdown."""

import re
from collections.abc import Iterable, Iterator

from lag_megatron.report.render.blocks import (
    Block,
    Drawing,
    Facts,
    Figure,
    Heading,
    Image,
    Table,
    Text,
)


def to_markdown(blocks: Iterable[Block]) -> str:
    """Text with pipe tables; drawings become their text, figures their caption, images links."""
    return "\n\n".join("\n".join(_lines(block)) for block in blocks) + "\n"


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Heading(level, text):
            yield f"{'#' * level} {_plain(text)}"
        case Text(text):
            yield _plain(text)
        case Facts(items):
            yield from (f"- {_plain(name)}: {_plain(value)}" for name, value in items)
        case Figure(_, caption):
            yield f"(Figure in report.html) {_plain(caption)}"
        case Image(path, caption):
            yield f"![{_plain(caption)}](figures/{path.name})"
        case Table():
            yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    if table.folded:
        yield f"{_plain(table.folded)}:"
        yield ""
    yield _row(column.removeprefix(">") for column in table.columns)
    yield _row(["--:" if column.startswith(">") else "---" for column in table.columns], raw=True)
    for row in table.rows:
        yield _row(cell.text if isinstance(cell, Drawing) else cell for cell in row)


def _row(cells: Iterable[str], *, raw: bool = False) -> str:
    return f"| {' | '.join(cell if raw else _plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """The text with everything escaped that Markdown or HTML would act on."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(text.split()))
