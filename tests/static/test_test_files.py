"""The whole tree of tests can be collected at once, as ``make test-slow`` does."""

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_two_test_files_have_one_name():
    """pytest imports each by its bare name, and refuses the second of a name."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
