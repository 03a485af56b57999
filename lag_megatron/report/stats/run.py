"""The numbers of a report, all of them JSON: what ``tools/report.py --json`` prints."""

import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lag_megatron.config.schema.stage_schedule import stage_ranges
from lag_megatron.planning.cost import parameter_count, steps_flops, tokens_per_step
from lag_megatron.planning.random_paths import mean_layers_run
from lag_megatron.report.stats.analysis import empty_analysis
from lag_megatron.report.stats.growth import growth_data, growth_settings
from lag_megatron.report.stats.lineage import lineage_data
from lag_megatron.report.stats.recorded_search import search_of
from lag_megatron.report.stats.rule_comparison import RULES, own_outcome
from lag_megatron.report.stats.run_files import GrowthFiles, Json, RunFiles, finite, read_run
from lag_megatron.report.stats.sources import sources_data

TRAIN, VAL, SPEED = "train/loss", "val/loss", "train/tokens_per_second"


def run_report_data(run_dir: Path) -> Json:
    """Every number of the report, read from the files of a run directory alone.

    Losses are in nats a token; steps are optimizer steps, those of a growth counted from growth.
    The analysis of the last growth event stands at the top, too.

    Raises:
        RunError: if it is no run directory or a file in it is damaged.
    """
    files = read_run(run_dir)
    stages = _stages(files)
    status = _status(files)
    growths = [
        {**growth_data(files, growth), "rules": _rules(files, growth)} for growth in files.growths
    ]
    last = growths[-1]["analysis"] if growths else empty_analysis()
    return {
        "name": files.run.get("name") or files.path.resolve().name,
        "device": files.run.get("device"),
        "world_size": files.run.get("world_size"),
        "vocab_size": files.run.get("vocab_size"),
        "unigram_entropy": finite(files.run.get("unigram_entropy")),
        "data": (files.run.get("data") or {}) | _compared(files),
        "tokens_per_step": tokens_per_step(files.config),
        "total_steps": files.config.total_steps,
        "sources": sources_data(files, step=status["step"]),
        "status": status,
        "stages": stages,
        "train_loss": series(files.metrics, TRAIN),
        "val_loss": series(files.metrics, VAL),
        "growth": growths,
        "lineage": lineage_data(growths, first_layers=files.config.layers_of(0)),
        **last,
    }


def _compared(files: RunFiles) -> Json:
    """How much of the prepared data was compared with its checksums."""
    event = last_event(files, event="data_compared")
    if event is None:
        return {}
    return {"compared_bytes": event["bytes"], "prepared_bytes": event["total"]}


def series(metrics: Iterable[Json], key: str) -> list[list[float]]:
    """``[step, value]`` in order of steps; of a step written twice the later line counts."""
    values = {
        line["step"]: value
        for line in metrics
        if "step" in line and (value := finite(line.get(key))) is not None
    }
    return [[step, values[step]] for step in sorted(values)]


def last_event(files: RunFiles, *, event: str, **match: object) -> Json | None:
    """The newest journal line of that event whose fields equal ``match``."""
    for line in reversed(files.journal):
        if line.get("event") == event and all(line.get(k) == v for k, v in match.items()):
            return line
    return None


def _rules(files: RunFiles, growth: GrowthFiles) -> list[Json]:
    """Both rules on the curves of an exhaustive run, where each had all of them to judge by."""
    if not growth.decision or not growth_settings(files, growth).exhaustive:
        return []
    search = search_of(files, growth)
    outcomes = [own_outcome(search, rule) for rule in RULES]
    return [outcome for outcome in outcomes if outcome is not None]


def _status(files: RunFiles) -> Json:
    finished = last_event(files, event="run_finished")
    last = files.journal[-1] if files.journal else {}
    steps = [line["step"] for line in files.metrics if isinstance(line.get("step"), int)]
    started = [line for line in files.journal if line.get("event") == "run_started"]
    return {
        "state": "finished" if finished else "unfinished",
        "step": (finished or {}).get("step", max(steps, default=0)),
        "val_loss": finite(finished.get("val_loss")) if finished else None,
        "last_event": last.get("event"),
        "last_time": _time(last.get("time")),
        "starts": len(started),
    }


def _time(value: object) -> str | None:
    """Journal times are seconds since 1970 or text already."""
    number = finite(value)
    if number is not None:
        return datetime.fromtimestamp(number, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return value if isinstance(value, str) else None


def _stages(files: RunFiles) -> list[Json]:
    config = files.config
    return [
        {
            "stage": number,
            "num_layers": config.layers_of(number),
            "layers_run": mean_layers_run(config, steps),
            "flops": _flops(files, steps),
            "parameters": _parameters(files, number),
            "steps": len(steps),
            "first_step": steps.start,
            "end_step": steps.stop,
            "tokens": len(steps) * tokens_per_step(config),
            "state": _stage_state(files, number),
            "ended_at_slope": _slope(files, number),
            "val_loss": _stage_loss(files, number),
            "tokens_per_second": _speed(files, number),
        }
        for number, steps in enumerate(stage_ranges(config.stages))
    ]


def _flops(files: RunFiles, steps: range) -> int | None:
    """Floating-point operations of these optimizer steps."""
    vocab_size = files.run.get("vocab_size")
    if not isinstance(vocab_size, int):
        return None
    return steps_flops(files.config, steps, vocab_size=vocab_size)


def _parameters(files: RunFiles, stage: int) -> int | None:
    counted = files.run.get("parameters") or []
    if stage < len(counted):
        return int(counted[stage])
    vocab_size = files.run.get("vocab_size")
    if not isinstance(vocab_size, int):
        return None
    layers = files.config.layers_of(stage)
    return parameter_count(files.config.model, num_layers=layers, vocab_size=vocab_size)


def _slope(files: RunFiles, stage: int) -> float | None:
    """The slope d log loss / d log compute that ended the stage, if one did."""
    return finite((last_event(files, event="stage_cut", stage=stage) or {}).get("slope"))


def _stage_state(files: RunFiles, stage: int) -> str:
    if last_event(files, event="stage_finished", stage=stage):
        return "finished"
    return "begun" if last_event(files, event="stage_started", stage=stage) else "to come"


def _stage_loss(files: RunFiles, stage: int) -> float | None:
    """The validation loss at the stage's end, or the newest one of an unfinished stage."""
    finished = last_event(files, event="stage_finished", stage=stage)
    if finished and (loss := finite(finished.get("val_loss"))) is not None:
        return loss
    losses = series((line for line in files.metrics if line.get("stage") == stage), VAL)
    return losses[-1][1] if losses else None


def _speed(files: RunFiles, stage: int) -> float | None:
    speeds: list[Any] = [
        value
        for line in files.metrics
        if line.get("stage") == stage and (value := finite(line.get(SPEED))) is not None
    ]
    return statistics.median(speeds) if speeds else None
