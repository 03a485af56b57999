"""A report as a list of blocks, written once and rendered as HTML and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; level 1 is the report's title."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; ``small`` for remarks on how to read something."""

    text: str
    small: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture inside a table, with the text that says the same."""

    svg: str
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text and drawings; columns whose title starts with ``>`` hold numbers.

    ``marks`` names, per row, a style such as ``win``; ``folded`` is the title under which HTML
    hides the table at first.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Drawing]]
    marks: Sequence[str] = field(default=())
    folded: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture of its own; Markdown keeps the caption."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Image:
    """A PNG file in the run directory's ``figures``; ``name`` says which kind.

    Markdown links it; HTML holds a copy of it, except where it shows the same as a drawing and
    ``in_html`` is false.
    """

    path: Path
    caption: str
    name: str
    in_html: bool = True


Block = Heading | Text | Facts | Table | Figure | Image
