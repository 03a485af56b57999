"""The numbers of the report of a search by ask and tell."""

from pathlib import Path

from lag_megatron.report.stats.growth import growth_data
from lag_megatron.report.stats.lineage import lineage_data
from lag_megatron.report.stats.run_files import Json, read_search_files


def search_report_data(directory: Path) -> Json:
    """Every number of the report, read from the files of a search directory alone.

    Its ``growth`` and ``lineage`` are those of a run's report.

    Raises:
        RunError: if a file in it is damaged.
    """
    files = read_search_files(directory)
    growths = [{**growth_data(files, growth), "rules": []} for growth in files.growths]
    first_layers = growths[0]["source_layers"] if growths else 0
    return {
        "name": files.path.resolve().name,
        "base": files.base,
        "growth": growths,
        "lineage": lineage_data(growths, first_layers=first_layers),
    }
