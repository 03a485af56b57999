"""Reports of synthetic run directories: numbers, pages, and runs that are not whole."""

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import SyntheticRun, make_config

from lag_megatron.config import dump_config
from lag_megatron.errors import ConfigError, RunError
from lag_megatron.report import report_data, write_report

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take a second a page; the tests of the tool and of figures draw them."""
    monkeypatch.setattr("lag_megatron.report.plots_available", lambda: False)


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    run = SyntheticRun(tmp_path / "demo")
    run.train(0)
    run.grow(1, failed="i2-b2-random")
    run.train(1)
    run.finish()
    return run.path


class Balance(HTMLParser):
    """Checks that every element is closed in order and that nothing is fetched."""

    VOID = ("meta", "rect", "line", "circle", "polyline", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        assert not {"href", "onclick"} & set(names)
        assert str(names.get("src", "data:")).startswith("data:")
        assert tag not in ("script", "link", "iframe", "image")
        if "id" in names:
            self.ids.append(str(names["id"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: Path) -> Balance:
    parser = Balance()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    return parser


def test_numbers_of_a_whole_run(whole_run: Path) -> None:
    data = report_data(whole_run)
    assert data["status"]["state"] == "finished"
    assert data["status"]["step"] == 800
    assert [s["parameters"] for s in data["stages"]] == [1_334_016, 1_730_560]
    assert [s["tokens"] for s in data["stages"]] == [600 * 4096, 200 * 4096]
    assert data["val_loss"][0] == [0, 8.32]
    (growth,) = data["growth"]
    assert (growth["source_layers"], growth["target_layers"], growth["step"]) == (4, 6, 600)
    best, *_, worst = growth["candidates"]
    assert growth["chosen"] == best["id"] == "i1-b2-random"
    assert best["drawing"] == "1 2 3 R R 4"
    assert (best["rank_at_lag"], best["rank_at_0"]) == (1, 11)
    assert best["behind_winner"] == 0
    assert (worst["status"], worst["rank_at_lag"], worst["steps"]) == ("failed", None, 20)
    assert growth["evidence"]["lag0_choice"] == "i0-b1-random"
    assert growth["evidence"]["lag0_regret"] == pytest.approx(0.066)
    assert growth["evidence"]["lag0_relative_regret"] == pytest.approx(1)
    assert growth["evidence"]["spearman"] == pytest.approx(-1)
    assert growth["evidence"]["spread_at_0"] == pytest.approx(1.32)
    assert growth["cost"]["probe_steps"] == 11 * 40 + 20
    assert growth["cost"]["exhaustive_steps"] == 480
    assert growth["cost"]["extra_steps"] == 420
    assert growth["cost"]["extra_of_run"] == pytest.approx(420 / 800)
    assert growth["cost"]["extra_of_continuation"] == pytest.approx(2.1)
    json.dumps(data, allow_nan=False)


def test_page_and_markdown_say_the_same(whole_run: Path) -> None:
    page = write_report(whole_run)
    assert page == whole_run / "report.html"
    shown = " ".join(parse(page).text)
    markdown = (whole_run / "report.md").read_text(encoding="utf-8")
    for words in (
        "Finished: 800 steps",
        "i1-b2-random has the lowest validation loss after 40 steps, 4.2340",
        "LAG@0 would have chosen i0-b1-random, which is 0.0660 nats worse there",
        "relative regret 1.00",
        "Spearman -1.000",
        "1.3200 at 0, 0.0660 at 40",
        "420 = 52.5% of the run's steps, 210.0% of the stage's that follows",
        "6.1234",
        "6.7 min",
        "1,730,560",
    ):
        assert words in shown
        assert words in markdown
    assert "1 2 3 R R 4" in markdown
    assert "31.2 is above growth.max_loss 20.0 <&>" in shown
    assert r"growth.max\_loss 20.0 \<&\>" in markdown


def test_the_same_files_give_the_same_bytes(whole_run: Path) -> None:
    command = [sys.executable, "tools/report.py", str(whole_run)]
    pages = []
    for seed in ("1", "2"):
        environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        pages.append((whole_run / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_torn_last_line_is_dropped(whole_run: Path) -> None:
    before = report_data(whole_run)
    for name in ("journal.jsonl", "metrics.jsonl", "growth01/i0-b1-random/probe.jsonl"):
        with (whole_run / name).open("a") as file:
            file.write('{"event": "checkpoint", "st')
    assert report_data(whole_run) == before


def test_a_damaged_line_in_the_middle_is_named(whole_run: Path) -> None:
    path = whole_run / "journal.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(RunError, match=r"journal\.jsonl:1: expected a line of a run"):
        report_data(whole_run)


def test_of_a_step_written_twice_the_later_line_counts(whole_run: Path) -> None:
    with (whole_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 800, "stage": 1, "val/loss": 1.25}) + "\n")
    assert report_data(whole_run)["val_loss"][-1] == [800, 1.25]


def test_a_run_that_stopped_while_probing(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "demo")
    run.train(0)
    first, second, *_ = run.start_growth(1)
    run.probe(1, first.id, {0: 4.5, 10: 4.4, 20: 4.3, 40: 4.2})
    run.event("probe_started", growth=1, id=second.id)
    line = {"step": 0, "val_loss": math.nan, "val_loss_batches": []}
    run.line(run.path / "growth01" / second.id / "probe.jsonl", line)
    (growth,) = report_data(run.path)["growth"]
    assert growth["state"] == "probing"
    assert growth["chosen"] is None
    assert growth["candidates"][0]["rank_at_lag"] == 1
    assert [c["status"] for c in growth["candidates"]] == ["finished", "begun"] + 10 * ["to come"]
    shown = " ".join(parse(write_report(run.path)).text)
    assert "Not finished: step 600 of 800 (75%)" in shown
    assert "1 of 12 candidates probed, undecided" in shown


def test_a_run_that_has_just_started(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "demo")
    shown = " ".join(parse(write_report(run.path)).text)
    assert "Last event in the journal: run_started at 2023-11-14 22:13:21 UTC" in shown
    assert "No losses have been written yet" in shown
    assert [s["state"] for s in report_data(run.path)["stages"]] == ["to come", "to come"]


def test_a_directory_with_only_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(make_config((4,))))
    parse(write_report(tmp_path))
    assert report_data(tmp_path)["name"] == tmp_path.name


def test_a_run_without_growth(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "demo", layers=(4,))
    run.train(0)
    run.finish()
    assert report_data(run.path)["growth"] == []
    assert "Nothing was grown" in " ".join(parse(write_report(run.path)).text)


def test_several_growths(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "demo", layers=(4, 6, 8))
    run.go_through()
    data = report_data(run.path)
    assert [g["target_layers"] for g in data["growth"]] == [6, 8]
    shown = " ".join(parse(write_report(run.path)).text)
    assert "Growth 2: 6 → 8 layers" in shown


def test_a_pool_of_one_compares_nothing(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "demo", pool="last")
    run.train(0)
    run.grow(1)
    shown = " ".join(parse(write_report(run.path)).text)
    assert "A pool of one, last: nothing was compared" in shown
    assert "LAG@0" not in shown
    assert report_data(run.path)["growth"][0]["evidence"]["spearman"] is None


def test_text_from_files_is_escaped(whole_run: Path) -> None:
    run = json.loads((whole_run / "run.json").read_text())
    run["name"] = "<script>alert(1)</script>"
    (whole_run / "run.json").write_text(json.dumps(run))
    parse(write_report(whole_run))
    assert "<script" not in (whole_run / "report.html").read_text()
    assert "<script" not in (whole_run / "report.md").read_text().replace(r"\<", "")


@pytest.mark.parametrize("missing", ["absent", "empty"])
def test_no_run_directory(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"runs/demo"):
        report_data(tmp_path / missing)


def test_a_configuration_that_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("stages: []\n")
    with pytest.raises(ConfigError):
        report_data(tmp_path)


def test_the_tool(whole_run: Path) -> None:
    def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "tools/report.py", *arguments],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    printed = tool(str(whole_run), "--json")
    assert json.loads(printed.stdout) == json.loads(json.dumps(report_data(whole_run)))
    assert not (whole_run / "report.html").exists()
    written = tool(str(whole_run))
    assert written.returncode == 0
    assert written.stdout.splitlines()[-1] == str(whole_run / "report.html")
    wrong = tool(str(whole_run / "nowhere"))
    assert wrong.returncode == 2
    assert "no such run directory" in wrong.stderr
    assert "Traceback" not in wrong.stderr
