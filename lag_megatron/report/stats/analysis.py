"""The paper's analysis of one growth event, with the pool's two baselines found by layer map."""

from collections.abc import Mapping, Sequence

from lag_megatron.report.stats.run_files import Json
from lag_megatron.selection.analysis import analyse_curves
from lag_megatron.selection.ranking import Curve


def growth_analysis(
    pool: Sequence[Json],
    curves: Mapping[str, Curve],
    *,
    lag: int,
    base_val_loss: float | None,
    chosen: str | None,
    scores: Mapping[str, Json],
) -> Json:
    """The analysis of one growth event's curves, with downstream scores where there are any.

    See :func:`~lag_megatron.selection.analysis.analyse_curves` for its keys.

    Args:
        pool: the candidates as in ``pool.json``.
        curves: loss in nats a token per step after growth, of those that have not failed.
        lag: step of the decision.
        base_val_loss: loss before growth.
        chosen: the rule's choice.
        scores: per candidate, task to value.
    """
    analysis = analyse_curves(
        curves,
        lag=lag,
        base_val_loss=base_val_loss,
        chosen=chosen,
        last_block=on_top(pool, init="duplicate"),
        random_block=on_top(pool, init="random"),
    )
    for row in analysis["table"].values():
        if row is not None and row["id"] in scores:
            row["scores"] = scores[row["id"]]
    return analysis


def empty_analysis() -> Json:
    """The analysis of a run without growth: the same keys, and nothing in them."""
    empty = growth_analysis((), {}, lag=0, base_val_loss=None, chosen=None, scores={})
    return {**empty, "table": {}}


def on_top(pool: Sequence[Json], *, init: str) -> list[str]:
    """Ids of the candidates that add all new layers on top, the one nearest to scale 1 first.

    With ``init`` ``duplicate`` they are copies of the last layers in their order (index = source
    layers - n, block n in Karp et al. 2024; their last stacking), with ``random`` fresh layers.
    """
    found = [c for c in pool if _is_on_top(c.get("layer_map") or (), init)]
    found.sort(key=lambda c: abs(_scale(c["layer_map"][-1]) - 1))
    return [c["id"] for c in found]


def _is_on_top(layer_map: Sequence[Json], init: str) -> bool:
    old = [layer["source"] for layer in layer_map if not layer["new"]]
    new = layer_map[len(old) :]
    copies = [layer["source"] for layer in new] == old[len(old) - len(new) :]
    return (
        bool(new)
        and all(layer["new"] and layer["init"] == init for layer in new)
        and (init == "random" or copies)
    )


def _scale(layer: Json) -> float:
    return float(layer.get("scale", 1.0))
