"""Line charts as inline SVG; colours and dashes are classes that the page's style defines."""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 980, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 190, 50, 46
LABEL_GAP = 14.0
CHARACTER = 6.7


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its style, its name (shown on hover) and the label at its right end, if any."""

    points: Sequence[Sequence[float]]
    style: str
    name: str
    label: str = ""
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal reference line."""

    value: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line; ``label`` is drawn above it if it fits."""

    value: float
    label: str
    line: bool = True


@dataclass(frozen=True, slots=True)
class _Axes:
    """From data to pixels."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixel position of a point; far outside values are kept near the frame."""
        right = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = min(max((y - self.y[0]) / (self.y[1] - self.y[0]), -9.0), 9.0)
        return (
            LEFT + right * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    title: str,
    levels: Sequence[Level] = (),
    marks: Sequence[Mark] = (),
    legend: Sequence[tuple[str, str]] = (),
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> str:
    """An SVG of curves with ticks, labels, reference lines and a legend of (style, text).

    What lies outside the ranges leaves the frame.
    """
    axes = _Axes(_span(*x_range, margin=0.0), _span(*y_range, margin=0.04))
    clip = f"clip{zlib.crc32(repr((title, axes, lines)).encode()):08x}"
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">',
        f'<clipPath id="{clip}"><rect x="{LEFT - 4}" y="{TOP}" '
        f'width="{WIDTH - LEFT - RIGHT + 8}" height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
        *_frame(axes, x_label=x_label, y_label=y_label),
        *_legend(legend),
        *_marks(marks, axes),
        *_levels(levels, axes),
        f'<g clip-path="url(#{clip})">',
        *(part for line in lines for part in _curve(line, axes)),
        "</g>",
        *_end_labels(lines, levels, axes),
        "</svg>",
    ]
    return "".join(parts)


def ticks(low: float, high: float, *, count: int = 6) -> list[float]:
    """At most about ``count`` round numbers (1, 2 or 5 times a power of ten) in the interval."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float, *, step: float) -> str:
    """The tick with as many decimals as its step needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"


def text(x: float, y: float, content: str, *, anchor: str = "start", style: str = "") -> str:
    """An SVG text element, escaped."""
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def segment(x1: float, y1: float, x2: float, y2: float, *, style: str) -> str:
    """An SVG line element."""
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _span(low: float, high: float, *, margin: float) -> tuple[float, float]:
    if low == high:
        low, high = low - 0.5, high + 0.5
    padding = (high - low) * margin
    return low - padding, high + padding


def _frame(axes: _Axes, *, x_label: str, y_label: str) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    y_ticks = ticks(*axes.y)
    for value in y_ticks:
        y = axes.place(axes.x[0], value)[1]
        yield segment(LEFT, y, right, y, style="grid")
        label = tick_text(value, step=_step(y_ticks))
        yield text(LEFT - 8, y + 4, label, anchor="end", style="tick")
    x_ticks = ticks(*axes.x, count=8)
    for value in x_ticks:
        x = axes.place(value, axes.y[0])[0]
        yield segment(x, bottom, x, bottom + 5, style="axis")
        label = tick_text(value, step=_step(x_ticks))
        yield text(x, bottom + 19, label, anchor="middle", style="tick")
    yield segment(LEFT, bottom, right, bottom, style="axis")
    yield text((LEFT + right) / 2, HEIGHT - 6, x_label, anchor="middle", style="label")
    middle = (TOP + bottom) / 2
    yield (
        f'<text class="label" text-anchor="middle" '
        f'transform="translate(14 {middle:.1f}) rotate(-90)">{escape(y_label)}</text>'
    )


def _step(values: Sequence[float]) -> float:
    return values[1] - values[0] if len(values) > 1 else 1.0


def _legend(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    x = float(LEFT)
    for style, name in entries:
        yield segment(x, 13, x + 30, 13, style=f"line {style}")
        yield text(x + 36, 17, name, style="label")
        x += 36 + CHARACTER * len(name) + 22


def _marks(marks: Iterable[Mark], axes: _Axes) -> Iterator[str]:
    free = 0.0
    for mark in marks:
        x = axes.place(mark.value, axes.y[0])[0]
        if mark.line:
            yield segment(x, TOP - 8, x, HEIGHT - BOTTOM, style="mark")
        if x >= free:
            yield text(x + 4, TOP - 6, mark.label, style="marktext")
            free = x + 4 + CHARACTER * (len(mark.label) + 1)


def _levels(levels: Iterable[Level], axes: _Axes) -> Iterator[str]:
    for level in levels:
        y = axes.place(axes.x[0], level.value)[1]
        yield segment(LEFT, y, WIDTH - RIGHT, y, style="level")


def _curve(line: Line, axes: _Axes) -> Iterator[str]:
    places = [axes.place(point[0], point[1]) for point in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<g><title>{escape(line.name)}</title><polyline class="line {line.style}" '
    yield f'points="{path}"/>'
    if line.dots or len(places) == 1:
        for x, y in places:
            yield f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    yield "</g>"


def _end_labels(lines: Sequence[Line], levels: Sequence[Level], axes: _Axes) -> Iterator[str]:
    """Labels to the right of the frame, at their curve's end, moved apart where they would meet."""
    wanted = [
        (axes.place(line.points[-1][0], line.points[-1][1])[1], line.label, f"end {line.style}")
        for line in lines
        if line.label and line.points
    ]
    wanted += [
        (axes.place(axes.x[0], level.value)[1], level.label, "end leveltext") for level in levels
    ]
    wanted.sort()
    for y, (_, label, style) in zip(_apart([w[0] for w in wanted]), wanted, strict=True):
        yield text(WIDTH - RIGHT + 8, y + 4, label, style=style)


def _apart(heights: Sequence[float]) -> list[float]:
    """Rising heights moved down, and up again at the bottom of the frame, to keep a gap."""
    placed: list[float] = []
    for y in heights:
        placed.append(max(y, TOP, placed[-1] + LABEL_GAP if placed else TOP))
    ceiling = HEIGHT - BOTTOM - 4.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - LABEL_GAP
    return placed
