"""The report of a run, made from the files of its directory alone."""

from pathlib import Path

from lag_megatron.report.render.html import to_html
from lag_megatron.report.render.markdown import to_markdown
from lag_megatron.report.sections.matplotlib_figures import (
    draw_figures,
    plots_available,
    write_figures,
)
from lag_megatron.report.sections.page import blocks
from lag_megatron.report.stats.recorded_search import record_search, write_search
from lag_megatron.report.stats.run import report_data

__all__ = [
    "plots_available",
    "record_search",
    "report_data",
    "write_figures",
    "write_report",
    "write_search",
]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html``, ``report.md`` and ``figures/*.png``; returns the first's path.

    Raises:
        RunError: if it is no run directory or a file in it is damaged.
    """
    data = report_data(run_dir)
    pictures = None
    if plots_available():
        folder = run_dir / "figures"
        pictures = {event["growth"]: draw_figures(event, folder) for event in data["growth"]}
    content = list(blocks(data, pictures))
    (run_dir / "report.md").write_text(to_markdown(content), encoding="utf-8")
    page = run_dir / "report.html"
    page.write_text(to_html(content, title=f"{data['name']}: report"), encoding="utf-8")
    return page
