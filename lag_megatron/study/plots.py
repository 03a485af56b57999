"""Figures of a study as PNG: the arms' curves over each measure of cost, and the differences."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lag_megatron.report.sections.matplotlib_figures import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    HALF,
    LOOK,
    ORANGE,
    SOFT,
    WIDE,
    Canvas,
)
from lag_megatron.report.stats.run_files import Json

Size = tuple[float, float]

LABELS = {
    "flops": "FLOPs, searches included",
    "tokens": "tokens trained by the run itself",
    "all_tokens": "tokens, with those of probes",
    "seconds": "seconds of training and searching",
}
_COLOURS = (BLUE, ORANGE, GREEN, GREY, SOFT)
_DASHES = ("-", "--", ":", "-.")
# The first losses lie far above what is compared, and would flatten it.
_EARLY = 0.15


def draw_study(results: Json, folder: Path) -> dict[str, Path]:
    """Draw what there is into ``folder``; paths by name, such as ``flops-constant``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = {}
    for name, (size, draw) in _drawings(results).items():
        folder.mkdir(exist_ok=True)
        with rc_context(LOOK):
            figure = Figure(figsize=size, dpi=DPI, layout="constrained")
            draw(figure)
            figure.savefig(folder / f"{name}.png")
        drawn[name] = folder / f"{name}.png"
    return drawn


def _drawings(results: Json) -> dict[str, tuple[Size, Callable[[Canvas], None]]]:
    found: dict[str, tuple[Size, Callable[[Canvas], None]]] = {}
    styles = _styles(results)
    for axis in LABELS:
        for rate in results["learning_rates"]:
            arms = [a for a in results["arms"] if a["learning_rate"] == rate and a["curve"]]
            if arms:
                found[f"{axis}-{rate}"] = (HALF, _curves_of(arms, axis, rate, styles))
    rows = [arm for arm in results["arms"] if arm["against_reference"]]
    if rows:
        height = 1.3 + 0.35 * len(rows)
        found["differences"] = ((WIDE[0], height), _differences_of(rows, results["reference"]))
    return found


def _styles(results: Json) -> dict[str, dict[str, str]]:
    """Colour and dashes of each arm, the same in every figure."""
    names = list(dict.fromkeys(arm["arm"] for arm in results["arms"]))
    return {
        name: {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        }
        for number, name in enumerate(names)
    }


def _curves_of(
    arms: Sequence[Json], axis: str, rate: str, styles: Mapping[str, Mapping[str, str]]
) -> Callable[[Canvas], None]:
    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        late = []
        for arm in arms:
            points, style = arm["curve"], styles[arm["arm"]]
            costs = [point[axis] for point in points]
            count = len(arm["seeds"])
            label = f"{arm['arm']} ({count} seed{'' if count == 1 else 's'})"
            axes.plot(costs, [point["loss"] for point in points], lw=1.6, label=label, **style)
            if all(point["low"] is not None for point in points):
                low, high = ([point[key] for point in points] for key in ("low", "high"))
                axes.fill_between(costs, low, high, color=style["color"], alpha=0.15, lw=0)
            late += [p["loss"] for p in points if p[axis] >= _EARLY * costs[-1]]
        padding = 0.06 * (max(late) - min(late)) or 0.01
        axes.set_ylim(min(late) - padding, max(late) + padding)
        axes.set_xlim(left=0)
        axes.set(xlabel=LABELS[axis], ylabel="validation loss (nats a token)", title=rate)
        axes.legend(loc="best")

    return draw


def _differences_of(rows: Sequence[Json], reference: str) -> Callable[[Canvas], None]:
    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        for place, row in enumerate(reversed(rows)):
            found = row["against_reference"]
            axes.plot(found["mean"], place, "o", color=BLUE)
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [place, place], color=BLUE, lw=1.6)
        names = [f"{row['arm']}, {row['learning_rate']}" for row in reversed(rows)]
        axes.set_yticks(range(len(rows)), names)
        axes.axvline(0, color=SOFT, ls="-.", lw=1)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set(xlabel=f"final validation loss, minus that of {reference} (nats a token)")

    return draw
