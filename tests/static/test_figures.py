"""The README's table of bounded figures is what the committed results say."""

from pathlib import Path

from tools.bench import tables

ROOT = Path(__file__).parents[2]


def test_the_table_is_generated_from_the_results():
    _, found, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(tables.BEGIN)
    assert found
    assert rest.partition(tables.END)[0].strip() == tables.table(), (
        "run python tools/bench/tables.py --write"
    )


def test_a_bound_is_met_or_missed():
    bound = tables.Bound
    assert bound("file", "figure", low=2).met(2)
    assert not bound("file", "figure", low=2).met(1.9)
    assert bound("file", "figure", high=2).met(1.9)
    assert not bound("file", "figure", high=2).met(2.1)
