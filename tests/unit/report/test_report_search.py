"""Reports of exhaustive and halved searches: analysis, pages and figures."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from searched_runs import LAST, RANDOM, STEPS, exhaustive_run, halved_run, losses_of
from synthetic_run import BASE_LOSS
from test_report import parse

from lag_megatron.errors import RunError
from lag_megatron.report import plots_available, report_data, write_figures, write_report
from lag_megatron.selection.analysis import analyse_curves

exhaustive = pytest.fixture(exhaustive_run)
halved = pytest.fixture(halved_run)
FIGURES = {"curves", "scatter", "correlation", "heatmap", "regret", "recall"}
needs_plots = pytest.mark.skipif(not plots_available(), reason="needs the extra plot")


def test_the_analysis_is_that_of_the_files(exhaustive: Path) -> None:
    data = report_data(exhaustive)
    curves = losses_of(exhaustive)
    assert len(curves) == 29
    settings: dict[str, Any] = {"lag": 40, "base_val_loss": BASE_LOSS, "chosen": None}
    expected = analyse_curves(curves, **settings, last_block=[LAST], random_block=[RANDOM])
    expected["table"]["last_block"]["scores"] = {"lambada": 0.0832, "remark": "not a number"}
    (growth,) = data["growth"]
    assert growth["analysis"] == expected
    assert {key: data[key] for key in expected} == expected
    assert data["steps"] == list(STEPS)
    assert data["table"]["last_block"]["id"] == LAST
    assert data["table"]["random_block"]["id"] == RANDOM
    assert data["spearman"][0] < -0.5
    assert data["spearman"][-1] == pytest.approx(1)


def test_the_page_of_an_exhaustive_run(exhaustive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lag_megatron.report.plots_available", lambda: False)
    table = report_data(exhaustive)["table"]
    shown = " ".join(parse(write_report(exhaustive)).text)
    for words in (
        "29 of 30 candidates were trained 200 steps, to the end.",
        f"last block on top {LAST} {table['last_block']['final_loss']:.4f}",
        f"random block on top {RANDOM} {table['random_block']['final_loss']:.4f}",
        "base model, before growth - 4.4000",
        "lambada",
        "0.0832",
        "The rules on these curves",
        "phase transition 16 steps after growth",
        "i4-b1-random was failed <&>",
        "Figures need matplotlib, which is not installed: pip install '.[plot]'.",
    ):
        assert words in shown
    assert "not a number" not in shown
    assert not (exhaustive / "figures").exists()


@needs_plots
def test_figures_on_the_page_and_beside_it(exhaustive: Path) -> None:
    page = write_report(exhaustive)
    parse(page)
    written = {path.name for path in (exhaustive / "figures").iterdir()}
    assert written == {f"growth01-{name}.png" for name in FIGURES}
    text, markdown = page.read_text(), (exhaustive / "report.md").read_text()
    # The curves are on the page as a drawing already, which Markdown cannot show.
    assert text.count("data:image/png;base64,") == len(FIGURES) - 1
    assert "Figures need matplotlib" not in text
    for name in FIGURES:
        assert f"](figures/growth01-{name}.png)" in markdown


@needs_plots
def test_figures_of_one_event(halved: Path) -> None:
    drawn = write_figures(halved, 1)
    assert set(drawn) == FIGURES
    for path in drawn.values():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    with pytest.raises(RunError, match="no growth event 2"):
        write_figures(halved, 2)


def test_figures_without_matplotlib(halved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    assert not plots_available()
    with pytest.raises(RunError, match=r"pip install '\.\[plot\]'"):
        write_figures(halved, 1)


def test_the_page_of_a_halved_pool(halved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lag_megatron.report.plots_available", lambda: False)
    (growth,) = report_data(halved)["growth"]
    assert [c["status"] for c in growth["candidates"]] == ["finished"] * 4 + ["stopped"] * 8
    assert growth["cost"]["exhaustive_steps"] == 12 * 40
    assert growth["evidence"]["lag0_regret"] is None
    assert growth["rules"] == []
    shown = " ".join(parse(write_report(halved)).text)
    for words in (
        "won after 40 steps, with loss 4.1000, 8 others having been stopped on the way.",
        "which did not get that far",
        "4 of 12 candidates reached step 40, whose loss stands for the final one here",
        "(not trained that far)",
        "10 12 12 0 0.310 - guard: the ranking still changes, nobody is stopped",
        "20 12 4 8 0.970 15 the worst stopped",
        "40 4 4 0 1.000 - decided: i0-b1-random",
        "by the mean of the evaluations in the second half before it",
        "was stopped <&>",
        "66.7% of 480 steps (|G|·k)",
    ):
        assert words in shown


def test_rungs_of_an_undecided_event(halved: Path) -> None:
    decision = json.loads((halved / "growth01" / "decision.json").read_text())
    (halved / "growth01" / "decision.json").unlink()
    with (halved / "journal.jsonl").open("a") as file:
        for rung in decision["rungs"][:2]:
            line = {"event": "rung_decided", "time": 1.7e9, "growth": 1, **rung}
            file.write(json.dumps(line) + "\n")
    (growth,) = report_data(halved)["growth"]
    assert growth["rungs"] == decision["rungs"][:2]
    assert [c["status"] for c in growth["candidates"]].count("stopped") == 8


@pytest.mark.parametrize("name", ["decision.json", "pool.json", f"{LAST}/scores.json"])
@pytest.mark.parametrize("content", ['{"chosen": "i', '"text"'])
def test_a_damaged_file_of_the_event(exhaustive: Path, name: str, content: str) -> None:
    (exhaustive / "growth01" / name).write_text(content)
    with pytest.raises(RunError, match=Path(name).name):
        report_data(exhaustive)
