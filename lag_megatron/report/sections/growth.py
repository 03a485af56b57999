"""The section of one growth event."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lag_megatron.report.render.blocks import Block, Facts, Heading, Table, Text
from lag_megatron.report.render.formatting import (
    NONE,
    duration,
    evenly_thinned,
    fixed,
    integer,
    loss,
    plural,
)
from lag_megatron.report.sections.findings import (
    finding_blocks,
    rule_blocks,
    rung_blocks,
    scored_tasks,
)
from lag_megatron.report.sections.svg_figures import (
    curves_figure,
    detail_figure,
    layer_map_drawing,
    ranks_figure,
)
from lag_megatron.report.stats.run_files import Json

MAX_COLUMNS = 16
MAX_LOST = 8
VALUES = {
    "last": "the last evaluation",
    "mean": "the mean of the evaluations in the second half before it",
    "ema": "the loss of the averaged weights",
}


def growth_summary(growth: Json) -> str:
    """One sentence or two on what was chosen and against what."""
    number = len(growth["candidates"])
    head = f"{growth['source_layers']} → {growth['target_layers']} layers at step {growth['step']}."
    states = [candidate["status"] for candidate in growth["candidates"]]
    if growth["state"] != "decided":
        return f"{head} {states.count('finished')} of {number} candidates probed, undecided."
    if number == 1:
        return f"{head} A pool of one, {growth['chosen']}: nothing was compared."
    plain = growth["rule"] == "lag" and growth["rung_value"] == "last"
    ties, value = len(growth["ties"]), loss(_winner(growth)["loss_at_lag"])
    words = (
        f"{head} Of {number} candidates {growth['chosen']} "
        f"{'has the lowest validation loss' if plain else 'won'} after {growth['lag']} steps, "
        f"{value if plain else f'with loss {value}'}"
    )
    if stopped := states.count("stopped"):
        words += f", {stopped} others having been stopped on the way"
    words += f"; {plural(ties, 'other')} cannot be told apart from it." if ties else "."
    return f"{words} {_lag0(growth)}"


def _lag0(growth: Json) -> str:
    evidence = growth["evidence"]
    if evidence["lag0_choice"] is None:
        return "All began with the same loss, so LAG@0 has no choice."
    if evidence["lag0_choice"] == growth["chosen"]:
        return "LAG@0 would have chosen the same."
    if evidence["lag0_regret"] is None:
        return f"LAG@0 would have chosen {evidence['lag0_choice']}, which did not get that far."
    return (
        f"LAG@0 would have chosen {evidence['lag0_choice']}, which is "
        f"{loss(evidence['lag0_regret'])} nats worse there."
    )


def growth_blocks(growth: Json, pictures: Mapping[str, Path] | None) -> Iterator[Block]:
    """The section of one event; ``pictures`` is None where matplotlib is missing."""
    title = f"Growth {growth['growth']}: {growth['source_layers']} → {growth['target_layers']}"
    yield Heading(2, f"{title} layers")
    yield Facts(list(_evidence(growth)))
    yield from finding_blocks(growth, pictures)
    yield from rule_blocks(growth)
    yield from rung_blocks(growth)
    yield from _lost(growth)
    yield Heading(3, "Candidates")
    yield _candidates(growth)
    yield Text(
        "Layers from bottom to top, numbered as before growth: outlined boxes are old layers, "
        "filled ones with * are copies of that layer, dashed R are freshly initialised.",
        small=True,
    )
    yield from _pictures(growth)
    yield _curves(growth)
    yield Heading(3, "Cost")
    yield Facts(list(_cost(growth)))


def _pictures(growth: Json) -> Iterator[Block]:
    if curves := curves_figure(growth):
        yield Heading(3, "Validation loss after growth")
        yield curves
    if detail := detail_figure(growth):
        yield detail
    if ranks := ranks_figure(growth):
        yield Heading(3, f"Ranks at 0 and at {growth['lag']}")
        yield ranks


def _evidence(growth: Json) -> Iterator[tuple[str, str]]:
    evidence, lag = growth["evidence"], growth["lag"]
    yield "validation loss before", loss(growth["base_val_loss"])
    yield "rule", f"{growth['rule']}, decides {lag} steps after growth{_by(growth)}"
    yield "winner", growth["chosen"] or "not decided yet"
    if len(growth["candidates"]) == 1:
        return
    if growth["phase_transition"] is not None:
        yield "phase transition", f"{growth['phase_transition']:,} steps after growth"
    yield "ties with the winner", ", ".join(growth["ties"]) or "none"
    yield "LAG@0 would have chosen", evidence["lag0_choice"] or NONE
    if evidence["lag0_regret"] is not None:
        yield (
            f"its loss above the best at {lag}",
            f"{loss(evidence['lag0_regret'])} (relative regret "
            f"{fixed(evidence['lag0_relative_regret'], 2)})",
        )
    yield (
        f"losses at 0 and at {lag}",
        f"Spearman {fixed(evidence['spearman'], 3)}, Pearson {fixed(evidence['pearson'], 3)}",
    )
    yield (
        "worst minus best",
        f"{loss(evidence['spread_at_0'])} at 0, {loss(evidence['spread_at_lag'])} at {lag}",
    )


def _by(growth: Json) -> str:
    value = growth["rung_value"]
    words = "" if value == "last" else f", by {VALUES.get(value, value)}"
    if growth["exhaustive"]:
        words += "; all candidates are trained to the end of the stage"
    return words


def _lost(growth: Json) -> Iterator[Block]:
    for status in ("failed", "stopped"):
        lost = [c for c in growth["candidates"] if c["status"] == status]
        if lost:
            yield Heading(3, f"{status.capitalize()} candidates")
            rows = [(c["id"], f"{c['steps']:,}", c["reason"] or NONE) for c in lost]
            folded = f"{len(lost)} candidates, with their reasons" if len(lost) > MAX_LOST else ""
            yield Table(("candidate", ">after steps", "reason"), rows, folded=folded)


def _candidates(growth: Json) -> Table:
    lag, tasks = growth["lag"], scored_tasks(c["scores"] for c in growth["candidates"])
    columns = (f">rank at {lag}", ">rank at 0", ">change", "candidate", "remark", "layers",
               ">loss at 0", f">loss at {lag}", ">behind winner",
               *(f">{task}" for task in tasks))  # fmt: skip
    rows, marks = [], []
    for candidate in growth["candidates"]:
        rows.append(
            (
                integer(candidate["rank_at_lag"]),
                integer(candidate["rank_at_0"]),
                _change(candidate),
                candidate["id"],
                _remark(candidate, growth),
                layer_map_drawing(candidate),
                loss(candidate["loss_at_0"]),
                loss(candidate["loss_at_lag"]),
                loss(candidate["behind_winner"]),
                *(fixed((candidate["scores"] or {}).get(task), 4) for task in tasks),
            )
        )
        marks.append("win" if candidate["id"] == growth["chosen"] else candidate["status"])
    return Table(columns, rows, marks)


def _change(candidate: Json) -> str:
    first, last = candidate["rank_at_0"], candidate["rank_at_lag"]
    if first is None or last is None:
        return NONE
    return "=" if first == last else f"▲{first - last}" if first > last else f"▼{last - first}"


def _remark(candidate: Json, growth: Json) -> str:
    words = []
    if candidate["id"] == growth["chosen"]:
        words.append("winner")
    if candidate["id"] == growth["evidence"]["lag0_choice"] and len(growth["candidates"]) > 1:
        words.append("LAG@0")
    if candidate["id"] in growth["ties"]:
        words.append("tie")
    if candidate["status"] != "finished":
        when = f" at {candidate['steps']:,}" if candidate["status"] == "stopped" else ""
        words.append(f"{candidate['status']}{when}")
    return ", ".join(words)


def _curves(growth: Json) -> Table:
    steps = sorted({step for c in growth["candidates"] for step, _ in c["curve"]})
    steps = evenly_thinned(steps, MAX_COLUMNS)
    rows = []
    for candidate in growth["candidates"]:
        losses = dict(candidate["curve"])
        rows.append((candidate["id"], *(loss(losses.get(step)) for step in steps)))
    columns = ("candidate", *(f">step {step:,}" for step in steps))
    return Table(columns, rows, folded="Validation losses as numbers")


def _cost(growth: Json) -> Iterator[tuple[str, str]]:
    cost = growth["cost"]
    yield "probe steps, all candidates", integer(cost["probe_steps"])
    share = cost["extra_of_continuation"]
    extra = f"{cost['extra_steps']:,}"
    if cost["extra_of_run"] is not None:
        extra += f" = {cost['extra_of_run']:.1%} of the run's steps"
    extra += "" if share is None else f", {share:.1%} of the stage's that follows"
    yield "beyond the winner's own", extra
    if cost["exhaustive_steps"]:
        all_steps = cost["exhaustive_steps"]
        yield (
            "against all candidates to the lag",
            f"{cost['probe_steps'] / all_steps:.1%} of {all_steps:,} steps (|G|·k)",
        )
    if cost.get("tokens") is not None:
        yield "tokens", integer(cost["tokens"])
    if cost.get("flops") is not None:
        whole = cost["flops_of_run"]
        of_run = "" if whole is None else f" = {whole:.1%} of the run's training"
        yield "FLOPs", f"{cost['flops']:.2e}{of_run}"
    if cost.get("seconds") is not None:
        yield "time", duration(cost["seconds"])


def _winner(growth: Json) -> Json:
    found: Json = next(c for c in growth["candidates"] if c["id"] == growth["chosen"])
    return found
