"""Blocks as one HTML page that needs nothing else."""

import base64
from collections.abc import Iterable, Iterator
from html import escape

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
from lag_megatron.report.render.css import STYLE


def to_html(blocks: Iterable[Block], *, title: str) -> str:
    """A self-contained page, readable on light and dark screens and on paper."""
    body = "\n".join(part for block in blocks for part in _parts(block))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _parts(block: Block) -> Iterator[str]:
    match block:
        case Heading(level, text):
            yield f"<h{level}>{escape(text)}</h{level}>"
        case Text(text, small):
            yield f"<p{' class=small' if small else ''}>{escape(text)}</p>"
        case Facts(items):
            pairs = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in items)
            yield f"<dl>{pairs}</dl>"
        case Figure(svg, caption):
            yield f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        case Image(path, caption, name, in_html):
            if in_html:
                data = base64.b64encode(path.read_bytes()).decode("ascii")
                yield (
                    f'<figure class="png {escape(name)}"><img alt="{escape(caption)}" '
                    f'src="data:image/png;base64,{data}">'
                    f"<figcaption>{escape(caption)}</figcaption></figure>"
                )
        case Table():
            yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    if table.folded:
        yield f"<details><summary>{escape(table.folded)}</summary>"
    yield '<div class="wide"><table>'
    heads = "".join(
        f"<th{_number(column)}>{escape(column.removeprefix('>'))}</th>" for column in table.columns
    )
    yield f"<thead><tr>{heads}</tr></thead><tbody>"
    for index, row in enumerate(table.rows):
        mark = f' class="{escape(table.marks[index])}"' if table.marks else ""
        cells = "".join(
            f"<td{_number(column)}>{_cell(cell)}</td>"
            for column, cell in zip(table.columns, row, strict=True)
        )
        yield f"<tr{mark}>{cells}</tr>"
    yield "</tbody></table></div>"
    if table.folded:
        yield "</details>"


def _number(column: str) -> str:
    return ' class="number"' if column.startswith(">") else ""


def _cell(cell: str | Drawing) -> str:
    return cell.svg if isinstance(cell, Drawing) else escape(cell)
