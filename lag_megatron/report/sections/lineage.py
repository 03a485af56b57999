"""The section that shows where each layer of the grown model came from."""

from collections.abc import Iterator, Sequence

from lag_megatron.report.render.blocks import Block, Figure, Heading, Table, Text
from lag_megatron.report.render.svg_chart import segment, text
from lag_megatron.report.stats.run_files import Json

BOX, GAP, TOP, COLUMN = 26, 18, 26, 150


def lineage_blocks(models: Sequence[Json]) -> Iterator[Block]:
    """A drawing and a table of every model's layers; nothing for a run that has not grown."""
    if len(models) < 2:
        return
    yield Heading(2, "Where the layers came from")
    yield Figure(
        _drawing(models),
        "Each column is a model, its bottom layer lowest. A number is the layer of the first model "
        "whose weights the layer began with, from 1; filled layers are copies, dashed ones fresh.",
    )
    rows = [
        (
            "first model" if not model["growth"] else f"growth {model['growth']}",
            model["chosen"] or "",
            str(len(model["layers"])),
            " ".join(_name(layer) for layer in model["layers"]),
        )
        for model in models
    ]
    yield Table(("model", "operator", ">layers", "origins from bottom to top"), rows)
    yield Text(
        "Numbers are layers of the first model, from 1; * was added as a copy by that event, "
        "R3 began with random weights in growth 3, I3 as an identity, R3* is a copy of one.",
        small=True,
    )


def _name(layer: Json) -> str:
    fresh = f"{'I' if layer['init'] == 'identity' else 'R'}{layer['born']}"
    name = fresh if layer["ancestor"] is None else str(layer["ancestor"] + 1)
    return f"{name}*" if layer["kind"] == "duplicate" else name


def _drawing(models: Sequence[Json]) -> str:
    highest = max(len(model["layers"]) for model in models)
    width, height = COLUMN * len(models), TOP + (highest + 1) * GAP

    def place(column: int, layer: int) -> tuple[float, float]:
        return 40 + column * COLUMN, height - (layer + 1) * GAP

    parts = [
        f'<svg class="layers" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="where each layer came from">'
    ]
    for column, model in enumerate(models):
        title = f"growth {model['growth']}" if column else "first model"
        x, _ = place(column, 0)
        parts.append(text(x, 14, f"{title}: {len(model['layers'])}", style="label"))
        for number, layer in enumerate(model["layers"]):
            x, y = place(column, number)
            if column and layer["source"] is not None:
                x_from, y_from = place(column - 1, layer["source"])
                style = "line win" if layer["kind"] == "duplicate" else "line"
                parts.append(segment(x_from + BOX, y_from, x, y, style=style))
            parts += _box(layer, x, y)
    return "".join([*parts, "</svg>"])


def _box(layer: Json, x: float, y: float) -> Iterator[str]:
    kind = layer["kind"]
    style = {"first": "old", "old": "old", "duplicate": "copy"}.get(kind, "fresh")
    yield (
        f'<rect class="{style}" x="{x}" y="{y - GAP / 2 + 1}" width="{BOX}" '
        f'height="{GAP - 3}" rx="3"/>'
    )
    yield text(x + BOX / 2, y + 3, _name(layer), anchor="middle", style=f"layer {style}")
