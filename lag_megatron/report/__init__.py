"""The report of a run, made from the files of its directory alone."""

from pathlib import Path

from lag_megatron.atomic_io import write_file
from lag_megatron.errors import RunError
from lag_megatron.report.render.html import to_html
from lag_megatron.report.render.markdown import to_markdown
from lag_megatron.report.sections.matplotlib_figures import (
    draw_figures,
    plots_available,
    write_figures,
)
from lag_megatron.report.sections.page import blocks
from lag_megatron.report.sections.search import search_blocks
from lag_megatron.report.stats.recorded_search import record_search, write_search
from lag_megatron.report.stats.run import run_report_data
from lag_megatron.report.stats.run_files import Json, is_search
from lag_megatron.report.stats.search import search_report_data
from lag_megatron.targets.writable import require_writable

__all__ = [
    "plots_available",
    "record_search",
    "report_data",
    "report_file",
    "write_figures",
    "write_report",
    "write_search",
]


def report_data(run_dir: Path) -> Json:
    """Every number of the report of a run directory, or of a search by ask and tell.

    Raises:
        RunError: if it is neither or a file in it is damaged.
    """
    return search_report_data(run_dir) if is_search(run_dir) else run_report_data(run_dir)


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write ``report.html``, ``report.md`` and ``figures/*.png``; returns the first's path.

    Args:
        run_dir: of a run or a search.
        output: the folder to write to, or the page's file, beside which the others are written;
            by default ``run_dir``.

    Raises:
        RunError: if it is neither a run directory nor a search's, a file in it is damaged, or the
            report cannot be written there.
    """
    page = report_file(run_dir, output)
    data = report_data(run_dir)
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = None
    if plots_available():
        folder = page.with_name("figures")
        pictures = {event["growth"]: draw_figures(event, folder) for event in data["growth"]}
    content = list((search_blocks if is_search(run_dir) else blocks)(data, pictures))
    write_file(page.with_suffix(".md"), to_markdown(content))
    write_file(page, to_html(content, title=f"{data['name']}: report"))
    return page


def report_file(run_dir: Path, output: Path | None = None) -> Path:
    """The page that :func:`write_report` writes, found to be writable.

    Raises:
        RunError: if it is not.
    """
    place = run_dir if output is None else output
    page = place if place.suffix == ".html" and not place.is_dir() else place / "report.html"
    if output is None and not run_dir.is_dir():
        return page  # reading says so
    advice = (
        "Name another place."
        if output is not None
        else "Give --output DIR (output=DIR in a program) to have the report elsewhere."
    )
    require_writable(page, "the report", error=RunError, advice=advice)
    return page
