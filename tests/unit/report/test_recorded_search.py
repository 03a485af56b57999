"""Rules replayed on searches, and searches recorded in a file: by the library and the tool."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from searched_runs import LAST, exhaustive_run, halved_run, losses_of

from lag_megatron.cli.report import main
from lag_megatron.errors import RunError
from lag_megatron.report import record_search, report_data, write_search
from lag_megatron.report.stats.recorded_search import read_search, recorded_searches
from lag_megatron.report.stats.rule_comparison import compare_rules

exhaustive = pytest.fixture(exhaustive_run)
halved = pytest.fixture(halved_run)


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
        (b'{"name": "torn', "expected a recorded search, but it cannot be read as JSON"),
        (b"[]", "expected a recorded search, but it holds a list"),
        (b"{}", "not a recorded search, which has name, config"),
        (b'{"name": 1, "config": {}, "pool": [], "base_val_loss": 1}', "which has name, config"),
        (
            b'{"name": "a", "config": {}, "pool": ["x"], "base_val_loss": 1, '
            b'"curves": {"x": [{"step": 1}]}}',
            "val_loss is missing",
        ),
        (
            b'{"name": "a", "config": {}, "pool": [{"i": 1}], "base_val_loss": 1, "curves": {}}',
            "id is missing",
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
    with pytest.raises(RunError, match="it cannot be unpacked"):
        read_search(path)
