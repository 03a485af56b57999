"""What the report of a search by ask and tell says, in which order."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lag_megatron.report.render.blocks import Block, Facts, Heading, Text
from lag_megatron.report.sections.growth import growth_blocks, growth_summary
from lag_megatron.report.sections.lineage import lineage_blocks
from lag_megatron.report.stats.run_files import Json


def search_blocks(data: Json, pictures: Mapping[int, Mapping[str, Path]] | None) -> Iterator[Block]:
    """The report of :func:`search_report_data`'s numbers; ``pictures`` as for a run's."""
    yield Heading(1, data["name"])
    for growth in data["growth"]:
        yield Text(growth_summary(growth))
    yield Facts([("base", data["base"])])
    yield from lineage_blocks(data["lineage"])
    for growth in data["growth"]:
        drawn = None if pictures is None else pictures.get(growth["growth"], {})
        yield from growth_blocks(growth, drawn)
