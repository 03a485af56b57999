"""The tables of bounded figures in the documents are what the committed results say."""

import json
from pathlib import Path

import pytest

from tools.bench import tables

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("page", "make"), [("docs/benchmarks.md", tables.table), ("README.md", tables.headlines)]
)
def test_the_table_is_generated_from_the_results(page, make):
    _, found, rest = (ROOT / page).read_text(encoding="utf-8").partition(tables.BEGIN)
    assert found
    assert rest.partition(tables.END)[0].strip() == make(), (
        "run python tools/bench/tables.py --write"
    )


def test_a_headline_says_when_its_bound_is_missed(tmp_path):
    for bound in tables.BOUNDS:
        if bound.figure in tables.HEADLINES:
            path = tmp_path / f"{bound.file}.json"
            known = json.loads(path.read_text())["figures"] if path.exists() else {}
            value = bound.low * 0.9 if bound.low is not None else bound.high * 1.1
            path.write_text(json.dumps({"figures": {**known, bound.figure: value}}))
    _, _, *rows = tables.headlines(tmp_path).splitlines()
    assert len(rows) == 5
    assert all("**missed**" in row for row in rows)


def test_a_bound_is_met_or_missed():
    bound = tables.Bound
    assert bound("file", "figure", low=2).met(2)
    assert not bound("file", "figure", low=2).met(1.9)
    assert bound("file", "figure", high=2).met(1.9)
    assert not bound("file", "figure", high=2).met(2.1)
