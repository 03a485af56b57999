"""The sources of a run's text: what there is of each, and what the run has seen."""

from lag_megatron.planning.blend import Blend
from lag_megatron.planning.cost import tokens_per_step
from lag_megatron.report.formatting import integer
from lag_megatron.report.render.blocks import Table
from lag_megatron.report.stats.run_files import Json, RunFiles


def sources_data(files: RunFiles, *, step: int) -> list[Json]:
    """The sources of a mixture after that many steps of the run; empty where there is only one.

    Candidates of growth events are not counted, except for the chosen ones' steps, which are the
    run's own.
    """
    sources = (files.run.get("data") or {}).get("sources") or []
    if not sources:
        return []
    config = files.config
    drawn = Blend([source["weight"] for source in sources]).drawn(
        step * config.parallel.global_batch
    )
    per_sample = tokens_per_step(config) // config.parallel.global_batch
    return [
        {
            "name": source["name"],
            "weight": source["weight"],
            "share": source["share"],
            "train_tokens": source["train_tokens"],
            "validation_tokens": source["validation_tokens"],
            "seen_tokens": samples * per_sample,
            "epochs": samples * per_sample / source["train_tokens"],
        }
        for source, samples in zip(sources, drawn, strict=True)
    ]


def sources_table(sources: list[Json]) -> Table:
    """One row a source."""
    rows = [
        (
            source["name"],
            f"{source['weight']:g}",
            f"{source['share']:.2%}",
            integer(source["train_tokens"]),
            integer(source["validation_tokens"]),
            integer(source["seen_tokens"]),
            f"{source['epochs']:.2f}",
        )
        for source in sources
    ]
    columns = ("source", ">weight", ">share", ">tokens to train on", ">to validate on",
               ">seen so far", ">epochs")  # fmt: skip
    return Table(columns, rows)
