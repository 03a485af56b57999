"""A decided growth event in W&B: a table, one chart, pictures, plan and decision."""

from pathlib import Path
from typing import Any

from lag_megatron.growth.operators.layer_map import format_layer_map
from lag_megatron.report import plots_available, write_figures
from lag_megatron.run.directory import RunDirectory, read_decision
from lag_megatron.run.wandb_logger import Wandb
from lag_megatron.search.event import GrowthEvent

Json = dict[str, Any]


def show_event(wandb: Wandb, run: RunDirectory, event: GrowthEvent) -> None:
    """Send a growth event's files to W&B; returns at once, the figures are drawn later."""
    folder = run.growth(event.number)
    decision: Json = read_decision(folder)
    curves = {c["id"]: [(step, loss) for step, loss in c["curve"]] for c in decision["candidates"]}
    columns, rows = candidate_table(event, decision)

    def images() -> dict[str, Path]:
        drawn = write_figures(run.root, event.number) if plots_available() else {}
        drawn.pop("curves", None)  # the chart shows them
        return drawn

    cost = decision["cost"]
    prefix = f"growth{event.number:02d}"
    wandb.event(
        event.number,
        columns=columns,
        rows=rows,
        curves={id_: points for id_, points in curves.items() if points},
        images=images,
        files=[folder / "pool.json", folder / "decision.json"],
        summary={
            f"{prefix}/chosen": decision["chosen"],
            f"{prefix}/lag": decision["lag"],
            f"{prefix}/phase_transition": decision["phase_transition"],
            f"{prefix}/probe_steps": cost["probe_steps"],
            f"{prefix}/probe_steps_share": cost["probe_steps"] / max(cost["exhaustive_steps"], 1),
        },
    )


def candidate_table(event: GrowthEvent, decision: Json) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: layer map, loss at 0 and at each rung, rank at the lag, status, chosen."""
    steps = sorted({0, *(rung["rung"] for rung in decision["rungs"])})
    losses = {c["id"]: dict(c["curve"]) for c in decision["candidates"]}
    lag = decision["lag"]
    ranking = sorted((id_ for id_ in losses if lag in losses[id_]), key=lambda i: losses[i][lag])
    maps = {candidate.id: format_layer_map(candidate.plan.layer_map) for candidate in event.pool}
    rows = [
        [
            c["id"],
            maps[c["id"]],
            *(losses[c["id"]].get(step) for step in steps),
            ranking.index(c["id"]) + 1 if c["id"] in ranking else None,
            c["status"],
            c["reason"],
            c["id"] == decision["chosen"],
        ]
        for c in decision["candidates"]
    ]
    names = [f"loss at {step}" for step in steps]
    return ["candidate", "layers", *names, "rank", "status", "reason", "chosen"], rows
