"""A search is given what it needs: no run configuration, nothing of training, no engine of its own.

So a Python API or another trainer can drive it, and its coordinator runs without torch.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "lag_megatron" / "search"
SEARCH = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in sorted(FOLDER.rglob("*.py"))
}
WITHOUT_TORCH = (
    *("candidate_dir", "candidates", "coordinator", "step_costs", "decision", "event"),
    *("ask_tell.search", "ask_tell.trial", "ask_tell.trial_store"),
)


def imported(path):
    """Dotted names of all imports of a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", SEARCH)
def test_a_search_is_given_what_it_needs(module):
    names = set(imported(SEARCH[module]))
    assert not [name for name in names if name.split(".")[-1] == "RunConfig"]
    assert not [name for name in names if name.startswith("lag_megatron.config.schema.run")]
    assert not [name for name in names if name.startswith("lag_megatron.training")]
    assert not [name for name in names if name.startswith("lag_megatron.engine.engine")]


def test_the_search_is_found():
    assert SEARCH.keys() > {"context", "worker", *WITHOUT_TORCH}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_coordinator_runs_without_torch(module):
    code = f"import sys, lag_megatron.search.{module}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert not {"torch", "deepspeed", "megatron"} & loaded
