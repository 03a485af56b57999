"""Growth policies compared at equal FLOPs: planned, run, and reported over seeds."""

import json
from pathlib import Path

from lag_megatron.atomic_io import write_file
from lag_megatron.report.render.html import to_html
from lag_megatron.report.render.markdown import to_markdown
from lag_megatron.report.sections.matplotlib_figures import plots_available
from lag_megatron.study.findings import finding_sentences
from lag_megatron.study.launch import LaunchResult, StudyFolder, launch_runs, prepare_study
from lag_megatron.study.plan import PlannedRun, StudyPlan, plan_study
from lag_megatron.study.plan_table import plan_text
from lag_megatron.study.plots import draw_study
from lag_megatron.study.report import study_blocks
from lag_megatron.study.results import study_results
from lag_megatron.study.schema import Study, load_study

__all__ = [
    "LaunchResult",
    "PlannedRun",
    "Study",
    "StudyFolder",
    "StudyPlan",
    "launch_runs",
    "load_study",
    "plan_study",
    "plan_text",
    "prepare_study",
    "write_study",
]


def write_study(plan: StudyPlan, folder: StudyFolder) -> Path:
    """Write ``results.json``, ``report.html``, ``report.md`` and ``figures/*.png``.

    Returns:
        The path of ``report.html``.
    """
    results = study_results(plan, folder)
    folder.root.mkdir(parents=True, exist_ok=True)
    pictures = draw_study(results, folder.root / "figures") if plots_available() else None
    content = list(study_blocks(results, pictures))
    results["finding_sentences"] = finding_sentences(results)
    write_file(folder.root / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_file(folder.root / "report.md", to_markdown(content))
    page = folder.root / "report.html"
    write_file(page, to_html(content, title=f"{plan.study.name}: report"))
    return page
