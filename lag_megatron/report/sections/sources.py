"""The table of a run's text sources."""

from lag_megatron.report.render.blocks import Table
from lag_megatron.report.render.formatting import integer
from lag_megatron.report.stats.run_files import Json


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
