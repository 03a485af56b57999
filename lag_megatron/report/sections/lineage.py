"""Where each layer of the grown model came from, over all growth events of a run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lag_megatron.report.render.blocks import Block, Figure, Heading, Table, Text
from lag_megatron.report.render.svg_chart import segment, text
from lag_megatron.report.stats.run_files import Json

BOX, GAP, TOP, COLUMN = 26, 18, 26, 150


def lineage_data(growths: Sequence[Json], *, first_layers: int) -> list[Json]:
    """The models of a run, oldest first, each layer with its origin.

    Args:
        growths: the decided events of :func:`~lag_megatron.report.stats.growth.growth_data`, in
            order.
        first_layers: layers of the model that was drawn.

    Returns:
        Per model ``growth`` (the event that made it; 0 is the first model), ``chosen``, and
        ``layers``, from the bottom: ``source`` (the layer of the model before, from 0; None for
        those of the first model and fresh ones), ``kind`` (``first``, ``old``, ``duplicate`` or
        ``fresh``), ``ancestor`` (the layer of the first model whose weights it began with;
        None where they were fresh), ``born`` (the event that made these; 0 is the first model) and
        ``init`` (how: ``random`` or ``identity``).
    """
    first = [
        {"source": None, "kind": "first", "born": 0, "init": "random", "ancestor": layer}
        for layer in range(first_layers)
    ]
    models: list[Json] = [{"growth": 0, "chosen": None, "layers": first}]
    for growth in growths:
        chosen = next((c for c in growth["candidates"] if c["id"] == growth["chosen"]), None)
        if chosen is None:
            break  # not decided yet: what follows is not known either
        if chosen.get("operator") == "identity":
            continue  # the model went on as it was
        before = models[-1]["layers"]
        layers = [_layer(entry, before, growth["growth"]) for entry in chosen["layer_map"]]
        models.append({"growth": growth["growth"], "chosen": chosen["id"], "layers": layers})
    return models


def lineage_blocks(models: Sequence[Json]) -> Iterator[Block]:
    """The history as a drawing and in words; nothing for a run that has not grown."""
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


def _layer(entry: Mapping[str, Any], before: Sequence[Json], growth: int) -> Json:
    """One layer of a grown model, from its entry in ``pool.json``."""
    source = before[entry["source"]]
    if not entry["new"]:
        return {**source, "source": entry["source"], "kind": "old"}
    if entry["init"] != "duplicate":
        fresh = {"born": growth, "init": entry["init"], "ancestor": None}
        return {"source": None, "kind": "fresh", **fresh}
    return {**source, "source": entry["source"], "kind": "duplicate"}


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
