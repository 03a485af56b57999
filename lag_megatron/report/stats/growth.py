"""The numbers of one growth event: rankings, regret, evidence and cost."""

import math
from collections.abc import Mapping
from typing import Any

from lag_megatron.config import GrowthConfig
from lag_megatron.growth.operators.layer_map import LayerOrigin, format_layer_map
from lag_megatron.planning.cost import stage_flops
from lag_megatron.report.stats.analysis import growth_analysis
from lag_megatron.report.stats.run_files import GrowthFiles, Json, RunFiles, SearchFiles, finite
from lag_megatron.selection import (
    least_disturbed,
    losses_at,
    pearson,
    rank,
    regret,
    relative_regret,
    spearman,
)

ENDINGS = ("failed", "stopped", "finished")
VERDICT = ("rung", "rank_correlation", "transition", "goes_on", "stopped")


def growth_data(files: RunFiles | SearchFiles, growth: GrowthFiles) -> Json:
    """What was grown, what the probes gave, who won and what it cost."""
    started = _event(files, growth, "growth_started")
    stage = _stage(files, growth)
    config = growth_settings(files, growth)
    decision = growth.decision or {}
    lag = _lag(config, growth)
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
        "exhaustive": config.exhaustive,
        "rung_value": decision.get("rung_value", config.compared_by),
        "min_rank_correlation": config.rank_bar,
        "base_val_loss": base,
        "chosen": chosen,
        "ties": decision.get("ties", []),
        "phase_transition": decision.get("phase_transition"),
        "rungs": _rungs(files, growth),
        "candidates": _candidates(growth, records, first, last, chosen),
        "evidence": _evidence(first, last),
        "cost": _cost(files, growth, lag=lag, records=records),
        "analysis": growth_analysis(
            growth.pool,
            alive,
            lag=lag,
            base_val_loss=base,
            chosen=chosen,
            scores=growth.scores,
        ),
    }


def growth_settings(files: RunFiles | SearchFiles, growth: GrowthFiles) -> GrowthConfig:
    """The configuration of that event."""
    if isinstance(files, SearchFiles):
        return files.settings
    stage = min(_stage(files, growth), len(files.config.stages) - 1)
    return files.config.growth_before(stage)


def _stage(files: RunFiles | SearchFiles, growth: GrowthFiles) -> int:
    return int(_event(files, growth, "growth_started").get("stage", growth.growth))


def _lag(config: GrowthConfig, growth: GrowthFiles) -> int:
    """The decision's lag; before it, the configured one, or where ``auto`` ends at the latest."""
    decided = (growth.decision or {}).get("lag")
    return decided if isinstance(decided, int) else config.last_rung


def _rungs(files: RunFiles | SearchFiles, growth: GrowthFiles) -> list[Json]:
    """The verdicts at the rungs, the decision's or, before there is one, the journal's."""
    if growth.decision and "rungs" in growth.decision:
        return list(growth.decision["rungs"])
    verdicts = {
        line["rung"]: {key: line.get(key) for key in VERDICT}
        for line in files.journal
        if line.get("event") == "rung_decided" and line.get("growth") == growth.growth
    }
    return [verdicts[rung] for rung in sorted(verdicts)]


def _event(files: RunFiles | SearchFiles, growth: GrowthFiles, event: str, **match: object) -> Json:
    wanted: Json = {"event": event, "growth": growth.growth, **match}
    for line in reversed(files.journal):
        if all(line.get(key) == value for key, value in wanted.items()):
            return line
    return {}


def _record(files: RunFiles | SearchFiles, growth: GrowthFiles, id_: str) -> Json:
    """A candidate's record from the decision; before that, from the journal and its curve."""
    for candidate in (growth.decision or {}).get("candidates", []):
        if candidate["id"] == id_:
            seconds = _event(files, growth, "probe_finished", id=id_).get("seconds")
            return {**candidate, "seconds": finite(seconds)}
    points = {line["step"]: finite(line.get("val_loss")) for line in growth.probes[id_]}
    endings = {word: _event(files, growth, f"probe_{word}", id=id_) for word in ENDINGS}
    ending: Json = next(filter(None, endings.values()), {})
    started = points or _event(files, growth, "probe_started", id=id_)
    ended = next((word for word, line in endings.items() if line), None)
    return {
        "id": id_,
        "status": ended or ("begun" if started else "to come"),
        "reason": ending.get("reason", ""),
        "steps": ending.get("step", max(points, default=0)),
        "curve": [[step, points[step]] for step in sorted(points) if points[step] is not None],
        "seconds": finite(ending.get("seconds")),
    }


def _candidates(
    growth: GrowthFiles,
    records: Mapping[str, Json],
    first: Mapping[str, float | None],
    last: Mapping[str, float | None],
    chosen: str | None,
) -> list[Json]:
    """One entry a candidate, best at the lag first, then those stopped last."""
    pool = {candidate["id"]: candidate for candidate in growth.pool}
    ranks_first, ranks_last = _ranks(first), _ranks(last)
    best = last.get(chosen) if chosen else None
    order = sorted(pool, key=lambda id_: _place(records[id_], ranks_last.get(id_)))
    rows = []
    for id_ in order:
        loss = last.get(id_)
        rows.append(
            {
                **records[id_],
                "operator": pool[id_].get("operator"),
                "layer_map": pool[id_]["layer_map"],
                "drawing": format_layer_map(
                    tuple(_origin(layer) for layer in pool[id_]["layer_map"])
                ),
                "loss_at_0": first.get(id_),
                "loss_at_lag": loss,
                "rank_at_0": ranks_first.get(id_),
                "rank_at_lag": ranks_last.get(id_),
                "behind_winner": None if loss is None or best is None else loss - best,
                "scores": growth.scores.get(id_),
            }
        )
    return rows


def _place(record: Json, rank_at_lag: int | None) -> tuple[float, ...]:
    """By rank at the lag; without one, by steps taken and loss there; failed ones last."""
    if rank_at_lag is not None:
        return (0, rank_at_lag)
    last = record["curve"][-1][1] if record["curve"] else math.inf
    return (2 if record["status"] == "failed" else 1, -record["steps"], last)


def _origin(layer: Mapping[str, Any]) -> LayerOrigin:
    scale = layer.get("scale", 1.0)  # pools of earlier versions had no scaled layers
    zero_norms = layer.get("silent", False)
    return LayerOrigin(layer["source"], layer["new"], layer["init"], scale, zero_norms=zero_norms)


def _ranks(losses: Mapping[str, float | None]) -> dict[str, int]:
    present = [id_ for id_ in rank(losses) if losses[id_] is not None]
    return {id_: number for number, id_ in enumerate(present, start=1)}


def _evidence(first: Mapping[str, float | None], last: Mapping[str, float | None]) -> Json:
    """LAG@0's choice and its price, and how the two rankings agree."""
    choice = least_disturbed(first)
    arrived = choice is not None and last.get(choice) is not None
    return {
        "lag0_choice": choice,
        "lag0_regret": regret(first, last) if arrived else None,
        "lag0_relative_regret": relative_regret(first, last) if arrived else None,
        "spearman": spearman(first, last),
        "pearson": pearson(first, last),
        "spread_at_0": _spread(first),
        "spread_at_lag": _spread(last),
    }


def _spread(losses: Mapping[str, float | None]) -> float | None:
    present = [loss for loss in losses.values() if loss is not None]
    return max(present) - min(present) if present else None


def _cost(
    files: RunFiles | SearchFiles, growth: GrowthFiles, *, lag: int, records: Mapping[str, Json]
) -> Json:
    """Probe steps; those of the winner go on in the run, the others are extra."""
    decision = growth.decision or {}
    cost = dict(decision.get("cost", {}))
    steps = int(cost.get("probe_steps", sum(r["steps"] for r in records.values())))
    kept = records[decision["chosen"]]["steps"] if decision.get("chosen") in records else 0
    extra = steps - kept
    shares = dict.fromkeys(("extra_of_run", "extra_of_continuation", "flops_of_run"))
    if isinstance(files, RunFiles):
        shares = _shares(files, stage=_stage(files, growth), extra=extra, flops=cost.get("flops"))
    return {
        **cost,
        "probe_steps": steps,
        "exhaustive_steps": int(cost.get("exhaustive_steps", len(growth.pool) * lag)),
        "extra_steps": extra,
        **shares,
    }


def _shares(files: RunFiles, *, stage: int, extra: int, flops: object) -> dict[str, float | None]:
    """What an event costs as shares of the run around it."""
    config, vocab_size = files.config, files.run.get("vocab_size")
    known, share = finite(flops), None
    if known is not None and isinstance(vocab_size, int):
        stages = range(len(config.stages))
        share = known / sum(stage_flops(config, s, vocab_size=vocab_size) for s in stages)
    return {
        "extra_of_run": extra / config.total_steps,
        "extra_of_continuation": extra / config.stages[stage].steps
        if stage < len(config.stages)
        else None,
        "flops_of_run": share,
    }
