"""The whole report of a run, as blocks in order."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lag_megatron.report.render.blocks import Block, Facts, Heading, Table, Text
from lag_megatron.report.render.formatting import NONE, evenly_thinned, integer, loss
from lag_megatron.report.sections.growth import growth_blocks, growth_summary
from lag_megatron.report.sections.lineage import lineage_blocks
from lag_megatron.report.sections.sources import sources_table
from lag_megatron.report.sections.svg_figures import run_figure
from lag_megatron.report.stats.run_files import Json

MAX_ROWS = 40


def blocks(data: Json, pictures: Mapping[int, Mapping[str, Path]] | None) -> Iterator[Block]:
    """The blocks of a report.

    Args:
        data: what :func:`~lag_megatron.report.stats.run.run_report_data` returns.
        pictures: PNG files by growth event and name; None where matplotlib is not installed.
    """
    yield Heading(1, data["name"])
    yield Text(_status(data))
    for growth in data["growth"]:
        yield Text(f"Growth {growth['growth']}: {growth_summary(growth)}")
    yield Facts(list(_facts(data)))
    yield Heading(2, "Loss")
    figure = run_figure(data)
    yield figure or Text("No losses have been written yet.")
    if data["val_loss"]:
        yield _validation(data["val_loss"])
    yield Heading(2, "Stages")
    yield _stages(data)
    yield from lineage_blocks(data["lineage"])
    if data["sources"]:
        yield Heading(2, "Sources of the text")
        yield sources_table(data["sources"])
    if not data["growth"]:
        yield Text("Nothing was grown in this run so far.", small=True)
    for growth in data["growth"]:
        drawn = None if pictures is None else pictures.get(growth["growth"], {})
        yield from growth_blocks(growth, drawn)


def _status(data: Json) -> str:
    status = data["status"]
    if status["state"] == "finished":
        again = f", in {status['starts']} starts" if status["starts"] > 1 else ""
        return (
            f"Finished: {status['step']:,} steps{again}. "
            f"Final validation loss {loss(status['val_loss'])}."
        )
    share = status["step"] / data["total_steps"]
    last = status["last_event"] or "none"
    when = f" at {status['last_time']}" if status["last_time"] else ""
    return (
        f"Not finished: step {status['step']:,} of {data['total_steps']:,} ({share:.0%}). "
        f"Last event in the journal: {last}{when}. If no process is at work, the run was stopped "
        "or has crashed; the command that started it goes on from its last checkpoint."
    )


def _facts(data: Json) -> Iterator[tuple[str, str]]:
    yield "device", str(data["device"] or NONE)
    yield "ranks", integer(data["world_size"])
    yield "vocabulary", integer(data["vocab_size"])
    yield "tokens a step", integer(data["tokens_per_step"])
    for name, value in data["data"].items():
        if isinstance(value, int | str):
            text = integer(value) if isinstance(value, int) else value
            yield f"data: {name.replace('_', ' ')}", text
    yield "unigram entropy", loss(data["unigram_entropy"])


def _stages(data: Json) -> Table:
    rows = [
        (
            str(stage["stage"]),
            str(stage["num_layers"]),
            f"{stage['layers_run']:.3g}",
            integer(stage["parameters"]),
            f"{stage['first_step']:,} to {stage['end_step']:,}",
            integer(stage["tokens"]),
            NONE if stage["flops"] is None else f"{stage['flops']:.3e}",
            loss(stage["val_loss"]),
            NONE if stage["tokens_per_second"] is None else f"{stage['tokens_per_second']:,.0f}",
            _state(stage),
        )
        for stage in data["stages"]
    ]
    columns = (">stage", ">layers", ">of them run", ">parameters", ">steps", ">tokens", ">FLOPs",
               ">validation loss", ">tokens/s (median)", "state")  # fmt: skip
    return Table(columns, rows)


def _state(stage: Json) -> str:
    slope = stage["ended_at_slope"]
    return stage["state"] if slope is None else f"{stage['state']} at slope {slope:.4f}"


def _validation(losses: list[list[float]]) -> Table:
    """The validation losses of the run, evenly thinned, the last one always there."""
    rows = [(f"{step:,}", loss(value)) for step, value in evenly_thinned(losses, MAX_ROWS)]
    return Table((">step", ">validation loss"), rows, folded="Validation losses of the run")
