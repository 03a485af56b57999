"""Where each layer of the grown model came from, over all growth events of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from lag_megatron.report.stats.run_files import Json


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


def _layer(entry: Mapping[str, Any], before: Sequence[Json], growth: int) -> Json:
    """One layer of a grown model, from its entry in ``pool.json``."""
    source = before[entry["source"]]
    if not entry["new"]:
        return {**source, "source": entry["source"], "kind": "old"}
    if entry["init"] != "duplicate":
        fresh = {"born": growth, "init": entry["init"], "ancestor": None}
        return {"source": None, "kind": "fresh", **fresh}
    return {**source, "source": entry["source"], "kind": "duplicate"}
