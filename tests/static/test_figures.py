"""The README's table of bounded figures is what the committed results say."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load_tables():
    path = ROOT / "tools" / "bench" / "tables.py"
    spec = importlib.util.spec_from_file_location("bench_tables", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_table_is_generated_from_the_results():
    tables = load_tables()
    _, found, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(tables.BEGIN)
    assert found
    assert rest.partition(tables.END)[0].strip() == tables.table(), (
        "run python tools/bench/tables.py --write"
    )


def test_a_bound_is_met_or_missed():
    bound = load_tables().Bound
    assert bound("file", "figure", low=2).met(2)
    assert not bound("file", "figure", low=2).met(1.9)
    assert bound("file", "figure", high=2).met(1.9)
    assert not bound("file", "figure", high=2).met(2.1)
