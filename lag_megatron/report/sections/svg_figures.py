"""The pictures of a report: the run, the candidates' curves, the change of ranks, layer maps."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from lag_megatron.report.render.blocks import Drawing, Figure
from lag_megatron.report.render.svg_chart import Level, Line, Mark, line_chart, segment, text
from lag_megatron.report.stats.run_files import Json

MAX_POINTS = 400
MAX_EXCESS = 6
ROW = 19


def run_figure(data: Json) -> Figure | None:
    """Training and validation loss over the whole run; None before the first loss."""
    train, val = thinned(data["train_loss"]), data["val_loss"]
    if not train and not val:
        return None
    total = data["total_steps"]
    late = [loss for step, loss in [*train, *val] if step >= total * 0.03]
    entropy = data["unigram_entropy"]
    losses = [loss for _, loss in [*train, *val]]
    reference = [] if entropy is None else [entropy]
    lowest, highest = min([*losses, *reference]), max(losses)
    top = max([*(late or losses), *reference])
    lines = [Line(train, "train", "training loss")] if train else []
    if val:
        label = f"validation {val[-1][1]:.4f}"
        lines.append(Line(val, "win", "validation loss", label=label, dots=len(val) <= 60))
    caption = "Loss in nats a token over the optimizer steps of the run."
    if len(data["train_loss"]) > MAX_POINTS:
        caption += " Training loss is averaged over neighbouring steps."
    if highest > top:
        caption += f" The first losses, up to {highest:.2f}, lie above the frame."
    if entropy is not None:
        caption += (
            " Unigram entropy is the loss of a model that knows how frequent each token is and "
            "nothing else."
        )
    svg = line_chart(
        lines,
        title="loss over the run",
        x_label="optimizer step",
        y_label="loss (nats a token)",
        levels=[] if entropy is None else [Level(entropy, f"unigram entropy {entropy:.4f}")],
        marks=list(_stage_marks(data)),
        legend=[("train", "training"), ("win", "validation")],
        y_range=(lowest, top),
        x_range=(0, total),
    )
    return Figure(svg, caption)


def curves_figure(growth: Json) -> Figure | None:
    """Validation loss of every candidate over its probe; None before the first evaluation."""
    base = growth["base_val_loss"]
    alive = _alive(growth)
    losses = [loss for c in alive for _, loss in c["curve"]]
    if not losses:
        return None
    kept = [loss for c in alive for step, loss in c["curve"] if step > 0] or losses
    kept += [] if base is None else [base]
    # What growth itself costs may be many times what is compared later: then cut it off.
    low, high = min(kept), max(kept)
    top = high if max(losses) - low > MAX_EXCESS * (high - low) else max([*losses, *kept])
    caption = "Validation loss of each candidate; steps count from growth. Hover for names."
    if max(losses) > top:
        caption += f" Losses right after growth, up to {max(losses):.2f}, lie above the frame."
    if any(c["status"] == "failed" and c["curve"] for c in growth["candidates"]):
        caption += " Curves of failed candidates may leave the frame."
    levels = [] if base is None else [Level(base, f"before growth {base:.4f}")]
    return Figure(
        _curves(growth, levels=levels, y_max=top, x_range=(0, _last_step(growth))), caption
    )


def detail_figure(growth: Json) -> Figure | None:
    """The same curves over the later half of the probe, where their differences are small.

    None where there are fewer than two evaluations, or where the whole picture shows as much.
    """
    lag, alive = growth["lag"], _alive(growth)
    late = [(step, loss) for c in alive for step, loss in c["curve"] if 2 * step >= lag]
    losses = [loss for c in alive for _, loss in c["curve"]]
    if len({step for step, _ in late}) < 2:
        return None
    low, high = min(loss for _, loss in late), max(loss for _, loss in late)
    if not 0 < high - low < (max(losses) - min(losses)) / 3:
        return None
    start = min(step for step, _ in late)
    svg = _curves(growth, levels=(), y_max=high, y_min=low, x_range=(start, _last_step(growth)))
    return Figure(svg, f"The same from step {start} on, enlarged.")


def ranks_figure(growth: Json) -> Figure | None:
    """The rankings right after growth and at the lag, side by side, joined by lines."""
    ranked = [c for c in growth["candidates"] if c["rank_at_0"] and c["rank_at_lag"]]
    if len(ranked) < 2:
        return None
    # Candidates with only one of the two losses would leave holes: rank the others anew.
    first = sorted(ranked, key=lambda c: c["rank_at_0"])
    last = sorted(ranked, key=lambda c: c["rank_at_lag"])
    height = ROW * len(ranked) + 34
    parts = [
        f'<svg class="ranks" viewBox="0 0 760 {height}" role="img" aria-label="change of ranks">',
        text(270, 16, "right after growth", anchor="end", style="label"),
        text(490, 16, f"after {growth['lag']} steps", style="label"),
    ]
    roles = _roles(growth)
    for candidate in reversed(last):
        style = roles.get(candidate["id"], _style(candidate))
        y_first = 34 + ROW * first.index(candidate)
        y_last = 34 + ROW * last.index(candidate)
        left = f"{candidate['id']}  {candidate['loss_at_0']:.4f}"
        right = f"{candidate['loss_at_lag']:.4f}  {candidate['id']}"
        parts += [
            segment(300, y_first, 460, y_last, style=f"line {style}"),
            text(270, y_first + 4, left, anchor="end", style=f"end {style}"),
            text(292, y_first + 4, str(first.index(candidate) + 1), anchor="end", style="tick"),
            text(468, y_last + 4, str(last.index(candidate) + 1), style="tick"),
            text(490, y_last + 4, right, style=f"end {style}"),
        ]
    parts.append("</svg>")
    return Figure("".join(parts), "The candidates by validation loss, the best on top.")


def layer_map_drawing(candidate: Json) -> Drawing:
    """A row of boxes, the bottom layer first: old ones outlined, copies filled, fresh dashed."""
    layers: Sequence[Mapping[str, Any]] = candidate["layer_map"]
    width = 24 if len(layers) <= 12 else 19 if len(layers) <= 24 else 15
    total = len(layers) * width + 2
    style = "layers" if width == 24 else "layers narrow"
    label = f"layers from bottom to top: {candidate['drawing']}"
    parts = [
        f'<svg class="{style}" width="{total}" height="22" viewBox="0 0 {total} 22" role="img" '
        f'aria-label="{escape(label)}">',
        *(part for n, layer in enumerate(layers) for part in _box(layer, 1 + n * width, width)),
        "</svg>",
    ]
    return Drawing("".join(parts), candidate["drawing"])


def thinned(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """At most ``MAX_POINTS`` points, each the mean of equally many neighbours."""
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (statistics.fmean(p[0] for p in group), statistics.fmean(p[1] for p in group))
        for group in groups
    ]


def _curves(
    growth: Json,
    *,
    levels: Sequence[Level],
    y_max: float,
    x_range: tuple[float, float],
    y_min: float | None = None,
) -> str:
    roles = _roles(growth)
    shown = {c["id"]: [p for p in c["curve"] if p[0] >= x_range[0]] for c in growth["candidates"]}
    candidates = [c for c in growth["candidates"] if shown[c["id"]]]
    plain = [c for c in candidates if c["id"] not in roles]
    lines = [Line(shown[c["id"]], _style(c), c["id"]) for c in plain]
    lines += [
        Line(shown[c["id"]], roles[c["id"]], c["id"], label=_role_label(c, roles), dots=True)
        for c in candidates
        if c["id"] in roles
    ]
    alive = [c["curve"] for c in _alive(growth)]
    low = min(loss for curve in alive for _, loss in curve) if y_min is None else y_min
    return line_chart(
        lines,
        title=f"growth {growth['growth']}: validation loss of the candidates",
        x_label="optimizer steps after growth",
        y_label="validation loss (nats a token)",
        levels=levels,
        legend=_legend(plain, roles),
        y_range=(min([low, *(level.value for level in levels)]), y_max),
        x_range=x_range,
    )


def _last_step(growth: Json) -> int:
    """Where the curves end: the lag, or later where candidates went on."""
    steps = [step for c in growth["candidates"] for step, _ in c["curve"]]
    return int(max([growth["lag"], *steps, 1]))


def _alive(growth: Json) -> list[Json]:
    return [c for c in growth["candidates"] if c["status"] != "failed"]


def _box(layer: Mapping[str, Any], x: float, width: float) -> Iterator[str]:
    style = "old" if not layer["new"] else "copy" if layer["init"] == "duplicate" else "fresh"
    name = "R" if style == "fresh" else f"{layer['source'] + 1}{'*' if layer['new'] else ''}"
    yield f'<rect class="{style}" x="{x:.1f}" y="2" width="{width - 2}" height="18" rx="3"/>'
    yield text(x + (width - 2) / 2, 15, name, anchor="middle", style=f"layer {style}")


def _stage_marks(data: Json) -> Iterator[Mark]:
    growths = {growth["stage"]: growth for growth in data["growth"]}
    for stage in data["stages"]:
        number = stage["stage"]
        label = f"{stage['num_layers']} layers"
        if number in growths:
            label = f"{growths[number]['source_layers']} → {label}"
        yield Mark(stage["first_step"], label, line=number > 0)


def _roles(growth: Json) -> dict[str, str]:
    """Style of the candidates that stand out: the winner, and what LAG@0 would have taken."""
    roles = {}
    if growth["evidence"]["lag0_choice"]:
        roles[growth["evidence"]["lag0_choice"]] = "lag0"
    if growth["chosen"]:
        roles[growth["chosen"]] = "win"
    return roles


def _role_label(candidate: Json, roles: Mapping[str, str]) -> str:
    role = "winner" if roles[candidate["id"]] == "win" else "LAG@0"
    return f"{role} {candidate['id']}"


def _legend(plain: Sequence[Json], roles: Mapping[str, str]) -> list[tuple[str, str]]:
    names = {"win": "winner", "lag0": "choice of LAG@0"}
    inits = {
        "duplicate": "duplicated layers",
        "random": "random layers",
        "failed": "failed",
    }
    present = {_style(candidate) for candidate in plain}
    return [(s, n) for s, n in names.items() if s in roles.values()] + [
        (style, name) for style, name in inits.items() if style in present
    ]


def _style(candidate: Json) -> str:
    if candidate["status"] == "failed":
        return "failed"
    new = [layer["init"] for layer in candidate["layer_map"] if layer["new"]]
    return "random" if "random" in new else "duplicate"
