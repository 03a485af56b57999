"""Programs hold no logic: they start a command of ``lag_megatron.cli``, which nothing else uses."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lag_megatron"
PROGRAMS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "launch").glob("*.py")])
MAX_CODE_LINES = 12
WITHOUT_TORCH = ("compare_policies", "plan_stages", "prepare_data", "report", "train")
NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported_from_outside(path: Path) -> set[str]:
    """All that a program imports besides the standard library."""
    return {
        name
        for name in imported_modules(path)
        if name.partition(".")[0] not in sys.stdlib_module_names
    }


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines that hold more than a comment or the module's docstring."""
    text = path.read_text(encoding="utf-8")
    docstring = ast.parse(text).body[0]
    return {
        number
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in NOT_CODE
        for number in range(token.start[0], token.end[0] + 1)
        if number > docstring.end_lineno
    }


def test_there_are_programs():
    assert {relative(path) for path in PROGRAMS} >= {"launch/train.py", "tools/report.py"}


@pytest.mark.parametrize("path", PROGRAMS, ids=relative)
def test_a_program_starts_its_command_and_no_more(path):
    command = f"lag_megatron.cli.{path.stem}"
    assert imported_from_outside(path) == {command, f"{command}.main"}
    assert len(code_lines(path)) <= MAX_CODE_LINES


def test_nothing_imports_commands():
    users = [
        relative(path)
        for path in PACKAGE.rglob("*.py")
        if path.parent != PACKAGE / "cli"
        for name in imported_modules(path)
        if name.startswith("lag_megatron.cli")
    ]
    assert not users


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_a_command_parses_before_it_imports_torch(name):
    code = f"import sys, lag_megatron.cli.{name}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "deepspeed", "megatron"} & set(result.stdout.split())
