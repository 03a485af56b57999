"""The learning rate over a run, plotted with characters."""

import textwrap
from collections.abc import Iterator

from lag_megatron.config import RunConfig
from lag_megatron.config.schema.stage_schedule import last_growth, stage_ranges, start_positions
from lag_megatron.planning.lr_schedule import Rate, rate_at, schedule_position

WIDTH = 72
HEIGHT = 8


def plot_lr(config: RunConfig) -> Iterator[str]:
    """Lines of the plot with a mark where each stage starts, then a sentence on each stage.

    ``#`` is the rate of all parameters; where those of new layers have less, ``#`` is theirs and
    ``.`` the others'.
    """
    total = config.total_steps
    width = min(WIDTH, total)
    columns = [column * (total - 1) // max(width - 1, 1) for column in range(width)]
    rates = [rate_at(step, config) for step in columns]
    top = max(rate.lr for rate in rates)
    for row in range(HEIGHT, 0, -1):
        label = f"{top * row / HEIGHT:.2e}" if row in (HEIGHT, HEIGHT // 2) else ""
        filled = "".join(_mark(rate, top * (row - 0.5) / HEIGHT) for rate in rates)
        yield f"{label:>9} |{filled}".rstrip()
    marks = [" "] * width
    ranges = stage_ranges(config.stages)
    for stage, steps in enumerate(ranges):
        column = next((i for i, step in enumerate(columns) if step >= steps.start), width - 1)
        marks[column] = str(stage) if stage < 10 else "+"
    yield f"{'0':>9} +{'-' * width}"
    yield f"{'stage':>9}  {''.join(marks)}".rstrip()
    starts = ", ".join(f"{stage} at {steps.start:,}" for stage, steps in enumerate(ranges))
    yield from _wrapped(f"steps 0 to {total - 1:,}; stages start: {starts}")
    for stage, steps in enumerate(ranges):
        if events := list(_events(config, stage, steps)):
            yield from _wrapped(f"stage {stage}: {'; '.join(events)}")


def _wrapped(text: str) -> list[str]:
    """A sentence under the plot, wrapped."""
    return textwrap.wrap(text, 98, initial_indent=" " * 11, subsequent_indent=" " * 13)


def _mark(rate: Rate, height: float) -> str:
    if rate.lr * rate.new_layers > height:
        return "#"
    return "." if rate.lr > height else " "


def _events(config: RunConfig, stage: int, steps: range) -> Iterator[str]:
    """Changes of the rate in a stage that the schedule alone does not cause."""
    schedule = config.optimizer.schedule
    position = start_positions(config)[stage]
    before = schedule_position(steps.start - 1, config) + 1 if stage else 0
    if position != before:
        yield f"the schedule goes on from position {position:,} instead of {before:,}"
    if last_growth(config, steps.start) == steps.start and schedule.growth_warmup_steps:
        whose = "new layers" if schedule.growth_warmup == "new" else "all parameters"
        yield f"the rate of {whose} rises from 0 over {schedule.growth_warmup_steps:,} steps"
