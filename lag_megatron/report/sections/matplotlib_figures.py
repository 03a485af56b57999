"""Figures of one growth event as PNG, drawn with matplotlib, which is the extra ``plot``."""

import importlib.util
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lag_megatron.atomic_io import write_file
from lag_megatron.errors import RunError
from lag_megatron.report.stats.growth import growth_data
from lag_megatron.report.stats.run_files import Json, read_run

BLUE, ORANGE, GREEN, GREY, SOFT = "#0a58ca", "#b3470b", "#1a7f37", "#8b95a1", "#5b6470"
DPI = 130
WIDE, HALF = (10.0, 4.2), (5.6, 4.2)
MAX_TICKS = 12
CROWDED = 40
LOOK = {"font.size": 10, "axes.titlesize": 10.5, "axes.edgecolor": GREY, "axes.grid": True,
        "grid.color": "#eef1f4", "axes.axisbelow": True, "legend.frameon": False,
        "xtick.color": SOFT, "ytick.color": SOFT, "axes.labelcolor": SOFT,
        "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip

Canvas = Any  # matplotlib.figure.Figure, which may not be there to import


def plots_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_figures(run_dir: Path, growth: int) -> dict[str, Path]:
    """Draw a growth event's figures into ``figures/growthNN-<name>.png`` of the run directory.

    Returns:
        Path by name: ``curves``, and where three or more candidates reached the same last step,
        ``heatmap``, ``scatter``, ``correlation``, ``recall`` and ``regret``.

    Raises:
        RunError: if matplotlib is missing, a file is damaged or there is no such event.
    """
    files = read_run(run_dir)
    for event in files.growths:
        if event.growth == growth:
            return draw_figures(growth_data(files, event), run_dir / "figures")
    raise RunError(f"{run_dir}: has no growth event {growth}.")


def draw_figures(growth: Json, folder: Path) -> dict[str, Path]:
    """Figures of one event, from :func:`~lag_megatron.report.stats.growth.growth_data`.

    Raises:
        RunError: if matplotlib is missing, or a figure cannot be written.
    """
    if not plots_available():
        raise RunError("Figures need matplotlib: pip install '.[plot]'.")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = {}
    for name, (size, draw) in _drawings(growth).items():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"growth{growth['growth']:02d}-{name}.png"
        with rc_context(LOOK):
            figure = Figure(figsize=size, dpi=DPI, layout="constrained")
            draw(figure, growth)
            picture = io.BytesIO()
            figure.savefig(picture, format="png")
        write_file(path, picture.getvalue())
        drawn[name] = path
    return drawn


def _drawings(
    growth: Json,
) -> dict[str, tuple[tuple[float, float], Callable[[Canvas, Json], None]]]:
    drawings: dict[str, tuple[tuple[float, float], Callable[[Canvas, Json], None]]] = {}
    if any(candidate["curve"] for candidate in growth["candidates"]):
        drawings["curves"] = (WIDE, _curves)
    if growth["analysis"]["table"].get("oracle"):
        drawings["scatter"] = (WIDE, _scatter)
        drawings["correlation"] = (HALF, _correlation)
        drawings["heatmap"] = (HALF, _heatmap)
        drawings["regret"] = (HALF, _regret)
        drawings["recall"] = (HALF, _recall)
    return drawings


def _curves(figure: Canvas, growth: Json) -> None:
    axes = figure.subplots()
    roles = _roles(growth)
    alive = [c for c in growth["candidates"] if c["status"] != "failed" and c["curve"]]
    for candidate in sorted(growth["candidates"], key=lambda c: c["id"] in roles):
        points = candidate["curve"]
        colour, label = roles.get(candidate["id"], (GREY, None))
        width, style = (2.0, "-") if label else (0.8, ":" if _is_random(candidate) else "-")
        axes.plot(*_columns(points), color=colour, lw=width, ls=style, label=label)
    later = [loss for c in alive for step, loss in c["curve"] if step > 0]
    if growth["base_val_loss"] is not None:
        label = f"before growth {growth['base_val_loss']:.4f}"
        axes.axhline(growth["base_val_loss"], color=SOFT, ls="-.", lw=1, label=label)
        later.append(growth["base_val_loss"])
    if len(set(later)) > 1:
        padding = (max(later) - min(later)) * 0.05
        axes.set_ylim(min(later) - padding, max(later) + padding)
    _step_axis(axes, sorted({step for c in alive for step, _ in c["curve"]}), growth)
    axes.set(ylabel="validation loss (nats a token)", title="Candidates (dotted: random layers)")
    axes.legend(loc="best")


def _scatter(figure: Canvas, growth: Json) -> None:
    steps = growth["analysis"]["steps"]
    final = steps[-1]
    shown = [step for step in dict.fromkeys((0, growth["lag"])) if step in steps and step != final]
    shown = shown or [steps[0]]
    for axes, step in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _scatter_panel(axes, growth, step=step, final=final)


def _scatter_panel(axes: Canvas, growth: Json, *, step: int, final: int) -> None:
    analysis, roles = growth["analysis"], _roles(growth)
    points = {c["id"]: (c, dict(map(tuple, c["curve"]))) for c in growth["candidates"]}
    for candidate, curve in points.values():
        if candidate["status"] == "failed" or step not in curve or final not in curve:
            continue
        colour, label = roles.get(candidate["id"], (GREY, None))
        axes.scatter(
            curve[step],
            curve[final],
            s=70 if label else 34,
            marker="o" if _is_random(candidate) else "s",
            facecolors="none" if _is_random(candidate) else colour,
            edgecolors=colour,
            linewidths=1.4,
            label=label,
            zorder=3 if label else 2,
        )
    base = growth["base_val_loss"]
    if base is not None:
        low, high = axes.get_xlim()
        near = low - (high - low) <= base <= high + (high - low)
        where = "" if near else " (outside)"
        label = f"before growth {base:.4f}{where}"
        # An empty line outside still puts the base model's loss into the legend.
        axes.plot([], [], color=SOFT, ls="-.", lw=1, label=label)
        if near:
            axes.axvline(base, color=SOFT, ls="-.", lw=1)
    axes.margins(0.08)
    place = analysis["steps"].index(step)
    words = [
        f"{name.capitalize()} {_number(analysis[name][place])}" for name in ("pearson", "spearman")
    ]
    axes.set(
        xlabel=f"loss {step:,} steps after growth",
        ylabel=f"final loss, after {final:,} steps",
        title=f"{', '.join(words)} (circles: random layers)",
    )
    axes.legend(loc="best", fontsize=8.5)


def _correlation(figure: Canvas, growth: Json) -> None:
    axes, analysis = figure.subplots(), growth["analysis"]
    for name, colour, style in (("spearman", BLUE, "-"), ("pearson", ORANGE, "--")):
        values = [math.nan if value is None else value for value in analysis[name]]
        marker = "o" if len(values) <= CROWDED else None
        axes.plot(
            analysis["steps"],
            values,
            style,
            color=colour,
            marker=marker,
            ms=3.5,
            label=name.capitalize(),
        )
    axes.axhline(0, color=GREY, lw=0.8)
    _step_axis(axes, analysis["steps"], growth)
    axes.set(ylim=(-1.05, 1.05), title="Correlation of the loss at t with the final loss")
    axes.legend(loc="best")


def _heatmap(figure: Canvas, growth: Json) -> None:
    axes, analysis = figure.subplots(), growth["analysis"]
    matrix = [[math.nan if v is None else v for v in row] for row in analysis["self_spearman"]]
    axes.set_facecolor("#d9dee4")
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, origin="lower", aspect="equal")
    steps = analysis["steps"]
    every = max(1, -(-len(steps) // MAX_TICKS))
    places = list(range(0, len(steps), every))
    labels = [f"{steps[place]:,}" for place in places]
    axes.set_xticks(places, labels, rotation=60 if len(places) > 8 else 0)
    axes.set_yticks(places, labels)
    axes.grid(False)
    axes.set(xlabel="steps after growth", ylabel="steps after growth")
    axes.set_title("Spearman between the losses at two steps")
    figure.colorbar(image, ax=axes, shrink=0.9)


def _regret(figure: Canvas, growth: Json) -> None:
    axes, analysis = figure.subplots(), growth["analysis"]
    crowded = len(analysis["steps"]) > CROWDED
    style: dict[str, Any] = {"color": BLUE, "marker": None if crowded else "o", "ms": 3.5}
    axes.plot(analysis["steps"], analysis["relative_regret"], **style)
    _step_axis(axes, analysis["steps"], growth)
    axes.set(ylabel="relative regret", ylim=(-0.03, 1.03), title="Regret of choosing at t")
    pairs = zip(analysis["regret"], analysis["relative_regret"], strict=True)
    spread = max((nats / share for nats, share in pairs if share > 0), default=None)
    if spread:  # one is the other times the spread of the final losses: two scales, one curve
        scales = (lambda share: share * spread, lambda nats: nats / spread)
        axes.secondary_yaxis("right", functions=scales).set_ylabel("regret (nats a token)")


def _recall(figure: Canvas, growth: Json) -> None:
    axes, analysis = figure.subplots(), growth["analysis"]
    for k, hits in analysis["recall"].items():
        for hit, fill in ((1, BLUE), (0, "none")):
            steps = [s for s, value in zip(analysis["steps"], hits, strict=True) if value == hit]
            axes.scatter(steps, [int(k)] * len(steps), s=42, facecolors=fill, edgecolors=BLUE)
    _step_axis(axes, analysis["steps"], growth)
    axes.set_yticks([int(k) for k in analysis["recall"]])
    axes.set(ylabel="k", ylim=(0.4, len(analysis["recall"]) + 0.6))
    axes.set_title("Recall@k: filled where the best is among the k best at t")


def _step_axis(axes: Canvas, steps: Sequence[int], growth: Json) -> None:
    """Steps after growth, logarithmic after the first where most of them lie early; the lag."""
    shown = growth["lag"] < (steps[-1] if steps else 0)
    lag = f" (dotted: the lag, {growth['lag']:,})" if shown else ""
    axes.set_xlabel(f"t, steps after growth{lag}")
    if len(steps) > 3 and steps[len(steps) // 2] <= 0.25 * steps[-1]:
        first = next(step for step in steps if step > 0)
        axes.set_xscale("symlog", linthresh=first)
        ticks = [0, *(t for t in _round_steps(steps[-1]) if t >= first)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlim(-0.3 * first, steps[-1] * 1.2)
    if shown:
        axes.axvline(growth["lag"], color=SOFT, ls=":", lw=1)


def _round_steps(last: int) -> list[int]:
    powers = [10**n for n in range(len(str(last)))]
    return [factor * power for power in powers for factor in (1, 3) if factor * power <= last]


def _roles(growth: Json) -> Mapping[str, tuple[str, str]]:
    """Colour and words of the candidates that stand out."""
    roles: dict[str, list[str]] = {}
    table = growth["analysis"]["table"]
    colours = {}
    for colour, name, id_ in (
        (GREEN, "best in the end", (table.get("oracle") or {}).get("id")),
        (ORANGE, "LAG@0", growth["evidence"]["lag0_choice"]),
        (BLUE, "winner", growth["chosen"]),
    ):
        if id_:
            roles.setdefault(id_, []).insert(0, name)
            colours[id_] = colour
    return {id_: (colours[id_], f"{', '.join(names)}: {id_}") for id_, names in roles.items()}


def _is_random(candidate: Json) -> bool:
    return any(layer["new"] and layer["init"] == "random" for layer in candidate["layer_map"])


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
