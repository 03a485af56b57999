"""Reports of exhaustive and halved searches: analysis, figures, rules replayed, recorded files."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import BASE_LOSS, SyntheticRun
from test_report import parse

from lag_megatron.errors import RunError
from lag_megatron.report import (
    plots_available,
    record_search,
    report_data,
    write_figures,
    write_report,
    write_search,
)
from lag_megatron.report.recorded import read_search, recorded_searches
from lag_megatron.report.rules import compare_rules
from lag_megatron.selection.analysis import analyse
from tools.report import main

STEPS = (0, 5, 8, 10, 16, 20, 32, 40, 100, 200)
POOL = {"operator": "lag", "index": [0, 2, 4, 6, 8], "block_size": "all"}
LAST, RANDOM = "i8-b4-duplicate", "i8-b4-random"
FIGURES = {"curves", "scatter", "correlation", "heatmap", "regret", "recall"}
needs_plots = pytest.mark.skipif(not plots_available(), reason="needs the extra plot")


def losses_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of all but the candidate that diverged, read by other means than the report's."""
    found = {}
    for candidate in json.loads((run / "growth01" / "pool.json").read_text()):
        lines = (run / "growth01" / candidate["id"] / "probe.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[candidate["id"]] = [(row["step"], row["val_loss"]) for row in rows]
    del found["i4-b1-random"]
    return found


@pytest.fixture
def exhaustive(tmp_path: Path) -> Path:
    """The paper's pool of 30, all trained to the end; one candidate diverged."""
    run = SyntheticRun(
        tmp_path / "demo", layers=(12, 16), pool=POOL, exhaustive=True, eval_steps=STEPS
    )
    run.train(0)
    curves = run.curves(1, STEPS)
    curves["i4-b1-random"] = {0: 4.5, 5: 31.0}
    run.start_growth(1)
    entries = [
        run.probe(1, id_, curve, ending="failed" if id_ == "i4-b1-random" else "finished")
        for id_, curve in curves.items()
    ]
    run.decide(1, entries, phase_transition=16)
    run.train(1)
    run.finish()
    scores = {"lambada": 0.0832, "remark": "not a number"}
    (run.path / "growth01" / LAST / "scores.json").write_text(json.dumps(scores))
    return run.path


@pytest.fixture
def halved(tmp_path: Path) -> Path:
    """Twelve candidates of which a rung's guard kept all, and the next stopped eight."""
    run = SyntheticRun(tmp_path / "halved", rule="halving")
    run.train(0)
    ids = [candidate.id for candidate in run.start_growth(1)]
    entries = []
    for place, id_ in enumerate(ids):
        curve = {0: 4.5 - place / 100, 10: 4.4, 16: 4.4, 20: 4.3 + place / 100}
        if place < 4:
            entries.append(run.probe(1, id_, {**curve, 32: 4.2, 40: 4.1 + place / 100}))
        else:
            entries.append(run.probe(1, id_, curve, ending="stopped"))
    verdict = {"transition": None, "stopped": []}
    run.decide(
        1,
        entries,
        rung_value="mean",
        phase_transition=15,
        rungs=[
            {**verdict, "rung": 10, "rank_correlation": 0.31, "goes_on": ids},
            {
                "rung": 20,
                "rank_correlation": 0.97,
                "transition": 15,
                "goes_on": ids[:4],
                "stopped": ids[4:],
            },
            {**verdict, "rung": 40, "rank_correlation": 1.0, "goes_on": ids[:4]},
        ],
    )
    return run.path


def test_the_analysis_is_that_of_the_files(exhaustive: Path) -> None:
    data = report_data(exhaustive)
    curves = losses_of(exhaustive)
    assert len(curves) == 29
    settings: dict[str, Any] = {"lag": 40, "base_val_loss": BASE_LOSS, "chosen": None}
    expected = analyse(curves, **settings, last_block=[LAST], random_block=[RANDOM])
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


def by_hand(curves: dict[str, dict[int, float]], rungs: tuple[int, ...], eta: int) -> Any:
    """Successive halving without a guard: who is left at the end, and the steps taken."""
    left, steps = list(curves), 0
    for before, rung in zip((0, *rungs), rungs, strict=False):
        left = [id_ for id_ in left if rung in curves[id_]]
        steps += len(left) * (rung - before)
        left.sort(key=lambda id_: curves[id_][rung])
        if rung != rungs[-1]:
            left = left[: -(-len(left) // eta)]
    return left[0], steps


def test_rules_replayed_equal_those_by_hand(exhaustive: Path) -> None:
    curves = {id_: dict(curve) for id_, curve in losses_of(exhaustive).items()}
    final = {id_: curve[200] for id_, curve in curves.items()}
    low, high = min(final.values()), max(final.values())
    (search,) = recorded_searches(exhaustive)
    settings = ["rungs=[10, 20, 100]", "lag=100", "growth.eta=2"]
    settings += ["min_rank_correlation=-1", "rung_value=last"]
    lag, halving = compare_rules(search, ["lag", "halving"], settings)["rules"]
    chosen, steps = by_hand(curves, (10, 20, 100), 2)
    assert (halving["chosen"], halving["probe_steps"]) == (chosen, steps)
    assert halving["regret"] == pytest.approx(final[chosen] - low)
    assert halving["relative_regret"] == pytest.approx((final[chosen] - low) / (high - low))
    assert halving["final_loss"] == final[chosen]
    assert [len(rung["stopped"]) for rung in halving["rungs"]] == [14, 7, 0]
    assert lag["chosen"] == min(curves, key=lambda id_: curves[id_][100])
    assert lag["probe_steps"] == 29 * 100
    assert lag["exhaustive_steps"] == 30 * 100
    assert lag["probe_steps"] > halving["probe_steps"]
    failed = next(c for c in lag["candidates"] if c["id"] == "i4-b1-random")
    assert failed["status"] == "failed"
    assert "31" in failed["reason"]


def test_a_new_lag_takes_the_place_of_later_rungs(exhaustive: Path) -> None:
    (search,) = recorded_searches(exhaustive)
    (rule,) = compare_rules(search, ["halving"], ["lag=20"])["rules"]
    assert rule["settings"]["rungs"] == (10, 20)
    assert rule["lag"] == 20


def test_a_recorded_search_says_what_its_run_says(exhaustive: Path, tmp_path: Path) -> None:
    for name in ("search.json", "search.json.gz"):
        path = tmp_path / name
        write_search(exhaustive, 1, path)
        search = read_search(path)
        assert set(search.curves) == {candidate["id"] for candidate in search.pool}
        here = compare_rules(search, ["lag", "halving"])["rules"]
        there = compare_rules(recorded_searches(exhaustive)[0], ["lag", "halving"])["rules"]
        for one, other in zip(here, there, strict=True):
            assert (one["chosen"], one["probe_steps"]) == (other["chosen"], other["probe_steps"])
            assert one["final_loss"] == pytest.approx(other["final_loss"], abs=1e-6)
    packed, plain = tmp_path / "search.json.gz", tmp_path / "search.json"
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    losses = record_search(exhaustive, 1)["curves"][LAST]
    assert all(round(row["val_loss"], 6) == row["val_loss"] for row in losses)
    with pytest.raises(RunError, match="no growth event 3"):
        record_search(exhaustive, 3)


def test_losses_that_are_no_numbers_survive_recording(halved: Path, tmp_path: Path) -> None:
    with (halved / "growth01" / "i0-b1-random" / "probe.jsonl").open("a") as file:
        file.write('{"step": 40, "val_loss": NaN, "val_loss_batches": [NaN]}\n')
    write_search(halved, 1, tmp_path / "search.json")
    text = (tmp_path / "search.json").read_text()
    assert "NaN" not in text
    (rule,) = compare_rules(read_search(tmp_path / "search.json"), ["lag"])["rules"]
    statuses = {c["id"]: c["status"] for c in rule["candidates"]}
    assert statuses["i0-b1-random"] == "failed"
    assert list(statuses.values()).count("finished") == 3


def test_the_tool_compares_rules(
    exhaustive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tool(*arguments: object) -> str:
        assert main([*map(str, arguments)]) == 0
        return capsys.readouterr().out

    data = json.loads(tool(exhaustive, "--rule", "lag", "--rule", "halving", "--json"))
    assert [rule["rule"] for rule in data["growth"][0]["rules"]] == ["lag", "halving"]
    search = tmp_path / "search.json.gz"
    assert tool(exhaustive, "--record", search).strip() == str(search)
    shown = tool(search, "--rule", "lag", "--set", "growth.lag=20")
    lines = [line.split() for line in shown.splitlines()]
    assert ["decides", "at", "step", "20"] in lines
    assert ["failed,", "or", "not", "recorded", "that", "far", "1"] in lines
    assert "relative regret" in shown
    assert "last_block" in tool(search)
    numbers = json.loads(tool(search, "--json"))
    expected = report_data(exhaustive)
    assert numbers["steps"] == expected["steps"]
    assert numbers["regret"] == pytest.approx(expected["regret"], abs=2e-6)
    for policy, row in expected["table"].items():
        assert numbers["table"][policy]["id"] == row["id"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "lag=33"], "steps [33] after growth, where none was evaluated"),
        (["--set", "growth.lagg=3"], "lagg"),
        (["--set", "eta"], "expected key.path=value"),
        (["--rule", "halving", "--set", "eta=1"], "growth.eta: must be 2 or more"),
        (["--growth", "7", "--rule", "lag"], "nothing was grown there"),
        (["--growth", "7", "--record", "/nowhere/x.json"], "no growth event 7"),
        (["--record", "/nowhere/x.json"], "/nowhere/x.json: cannot be written"),
    ],
)
def test_mistakes_on_the_command_line(
    exhaustive: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(exhaustive), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such run directory or recorded search"),
        (b'{"name": "torn', "cannot be read as a recorded search"),
        (b"[]", "not a recorded search, which has name, config"),
        (b'{"name": 1, "config": {}, "pool": [], "base_val_loss": 1}', "which has name, config"),
        (
            b'{"name": "a", "config": {}, "pool": ["x"], "base_val_loss": 1, '
            b'"curves": {"x": [{"step": 1}]}}',
            "wrong or missing",
        ),
        (
            b'{"name": "a", "config": {}, "pool": [{"i": 1}], "base_val_loss": 1, "curves": {}}',
            "'id'",
        ),
    ],
)
def test_a_damaged_recorded_search(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "search.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=words) as caught:
        read_search(path)
    assert str(path) in str(caught.value)


def test_a_torn_packed_search(exhaustive: Path, tmp_path: Path) -> None:
    path = tmp_path / "search.json.gz"
    write_search(exhaustive, 1, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="cannot be read"):
        read_search(path)


@pytest.mark.parametrize("name", ["decision.json", "pool.json", f"{LAST}/scores.json"])
@pytest.mark.parametrize("content", ['{"chosen": "i', '"text"'])
def test_a_damaged_file_of_the_event(exhaustive: Path, name: str, content: str) -> None:
    (exhaustive / "growth01" / name).write_text(content)
    with pytest.raises(RunError, match=Path(name).name):
        report_data(exhaustive)
