"""The numbers of one growth event: rankings, regret, evidence and cost."""

from collections.abc import Mapping
from typing import Any

from lag_megatron.growth.layer_map import LayerOrigin, draw
from lag_megatron.report.read import GrowthFiles, Json, RunFiles, finite
from lag_megatron.schedule import stage_flops
from lag_megatron.selection import (
    lag_rule,
    losses_at,
    pearson,
    rank,
    regret,
    relative_regret,
    spearman,
)


def growth_data(files: RunFiles, growth: GrowthFiles) -> Json:
    """What was grown, what the probes gave, who won and what it cost."""
    started = _event(files, growth, "growth_started")
    stage = int(started.get("stage", growth.growth))
    config = files.config.growth_before(min(stage, len(files.config.stages) - 1))
    decision = growth.decision or {}
    lag: int = {"lag": config.lag, **started, **decision}["lag"]
    records = {c["id"]: _record(files, growth, c["id"]) for c in growth.pool}
    alive = {id_: r["curve"] for id_, r in records.items() if r["status"] != "failed"}
    first, last = losses_at(alive, step=0), losses_at(alive, step=lag)
    chosen = decision.get("chosen")
    base = finite(decision.get("base_val_loss", started.get("base_val_loss")))
    return {
        "growth": growth.growth,
        "stage": stage,
        "step": started.get("step"),
        "state": "decided" if growth.decision else "probing",
        "source_layers": growth.pool[0]["source_layers"] if growth.pool else None,
        "target_layers": growth.pool[0]["target_layers"] if growth.pool else None,
        "rule": decision.get("rule", started.get("rule", config.rule)),
        "lag": lag,
        "base_val_loss": base,
        "chosen": chosen,
        "ties": decision.get("ties", []),
        "candidates": _candidates(growth, records, first, last, chosen),
        "evidence": _evidence(first, last),
        "cost": _cost(files, growth, stage=stage, records=records),
    }


def _event(files: RunFiles, growth: GrowthFiles, event: str, **match: object) -> Json:
    wanted: Json = {"event": event, "growth": growth.growth, **match}
    for line in reversed(files.journal):
        if all(line.get(key) == value for key, value in wanted.items()):
            return line
    return {}


def _record(files: RunFiles, growth: GrowthFiles, id_: str) -> Json:
    """The decision's word on a candidate; before there is one, the journal's and its curve's."""
    for candidate in (growth.decision or {}).get("candidates", []):
        if candidate["id"] == id_:
            seconds = _event(files, growth, "probe_finished", id=id_).get("seconds")
            return {**candidate, "seconds": finite(seconds)}
    points = {line["step"]: finite(line.get("val_loss")) for line in growth.probes[id_]}
    failed = _event(files, growth, "probe_failed", id=id_)
    finished = _event(files, growth, "probe_finished", id=id_)
    started = points or _event(files, growth, "probe_started", id=id_)
    status = "failed" if failed else "finished" if finished else "begun" if started else "to come"
    return {
        "id": id_,
        "status": status,
        "reason": failed.get("reason", ""),
        "steps": failed.get("step", max(points, default=0)),
        "curve": [[step, points[step]] for step in sorted(points) if points[step] is not None],
        "seconds": finite(finished.get("seconds")),
    }


def _candidates(
    growth: GrowthFiles,
    records: Mapping[str, Json],
    first: Mapping[str, float | None],
    last: Mapping[str, float | None],
    chosen: str | None,
) -> list[Json]:
    """One entry a candidate, best at the lag first."""
    pool = {candidate["id"]: candidate for candidate in growth.pool}
    ranks_first, ranks_last = _ranks(first), _ranks(last)
    best = last.get(chosen) if chosen else None
    order = [*rank(last), *(id_ for id_ in pool if id_ not in last)]
    rows = []
    for id_ in order:
        loss = last.get(id_)
        rows.append(
            {
                **records[id_],
                "operator": pool[id_].get("operator"),
                "layer_map": pool[id_]["layer_map"],
                "drawing": draw(tuple(_origin(layer) for layer in pool[id_]["layer_map"])),
                "loss_at_0": first.get(id_),
                "loss_at_lag": loss,
                "rank_at_0": ranks_first.get(id_),
                "rank_at_lag": ranks_last.get(id_),
                "behind_winner": None if loss is None or best is None else loss - best,
            }
        )
    return rows


def _origin(layer: Mapping[str, Any]) -> LayerOrigin:
    scale = layer.get("scale", 1.0)  # pools of earlier versions had no scaled layers
    return LayerOrigin(layer["source"], layer["new"], layer["init"], scale)


def _ranks(losses: Mapping[str, float | None]) -> dict[str, int]:
    present = [id_ for id_ in rank(losses) if losses[id_] is not None]
    return {id_: number for number, id_ in enumerate(present, start=1)}


def _evidence(first: Mapping[str, float | None], last: Mapping[str, float | None]) -> Json:
    """LAG@0's choice and its price, and how the two rankings agree."""
    return {
        "lag0_choice": lag_rule(first),
        "lag0_regret": regret(first, last),
        "lag0_relative_regret": relative_regret(first, last),
        "spearman": spearman(first, last),
        "pearson": pearson(first, last),
        "spread_at_0": _spread(first),
        "spread_at_lag": _spread(last),
    }


def _spread(losses: Mapping[str, float | None]) -> float | None:
    present = [loss for loss in losses.values() if loss is not None]
    return max(present) - min(present) if present else None


def _cost(files: RunFiles, growth: GrowthFiles, *, stage: int, records: Mapping[str, Json]) -> Json:
    """Probe steps; those of the winner go on in the run, the others are extra."""
    config, decision = files.config, growth.decision or {}
    cost = dict(decision.get("cost", {}))
    steps = int(cost.get("probe_steps", sum(r["steps"] for r in records.values())))
    kept = records[decision["chosen"]]["steps"] if decision.get("chosen") in records else 0
    vocab_size = files.run.get("vocab_size")
    flops, share = finite(cost.get("flops")), None
    if flops is not None and isinstance(vocab_size, int):
        stages = range(len(config.stages))
        share = flops / sum(stage_flops(config, s, vocab_size=vocab_size) for s in stages)
    return {
        **cost,
        "probe_steps": steps,
        "extra_steps": steps - kept,
        "extra_of_run": (steps - kept) / config.total_steps,
        "extra_of_continuation": (steps - kept) / config.stages[stage].steps
        if stage < len(config.stages)
        else None,
        "flops_of_run": share,
    }
