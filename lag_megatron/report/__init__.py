"""The report of a run, made from the files of its directory alone."""

from pathlib import Path

from lag_megatron.report.content import blocks
from lag_megatron.report.data import report_data
from lag_megatron.report.html import to_html
from lag_megatron.report.markdown import to_markdown

__all__ = ["report_data", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and ``report.md`` into the run directory and return the former's path.

    Raises:
        RunError: if it is no run directory or a file in it is damaged.
    """
    data = report_data(run_dir)
    content = list(blocks(data))
    (run_dir / "report.md").write_text(to_markdown(content), encoding="utf-8")
    page = run_dir / "report.html"
    page.write_text(to_html(content, title=f"{data['name']}: report"), encoding="utf-8")
    return page
