"""The architecture, read from the source: who may import whom, and how long things may be."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "lag_megatron"
FLOORS = (
    ("errors", "config"),
    (
        "atomic_io",
        "planning",
        "run",
        "files",
        "caches",
        "mixture",
        "learning_rate",
        "paths",
        "vocabulary",
        "rate_curve",
        "scaling_law",
        "slope",
        "stage_plan",
        "published_stages",
        "step_result",
        "schedule",
        "search_cost",
        "tracking",
        "wandb_mirror",
        "wandb_runs",
        "rundir",
        "stopping",
        "watch",
        "heartbeat",
        "selection",
    ),
    ("checkpoint", "growth"),
    (
        "distributed",
        "rendezvous",
        "parallel",
        "model",
        "data",
        "kernels",
        "sums",
        "kept",
        "forward_weights",
        "live",
        "layer_rates",
        "subnetwork",
        "averaging",
        "zero_step",
        "engine",
    ),
    ("probe", "search"),
    (
        "training",
        "trainer",
        "initial",
        "measuring",
        "session",
        "mirror",
        "evaluation",
        "report",
        "dry_run",
        "study",
    ),
    ("cli",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
SOURCES = sorted(
    p for folder in (PACKAGE, "tools", "launch") for p in (ROOT / folder).rglob("*.py")
)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(module: str) -> Iterator[str]:
    """Everything a module imports, lazily or not, as absolute dotted names."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            prefix = ".".join([*above, node.module or ""]) if node.level else node.module
            yield from (f"{prefix.rstrip('.')}.{alias.name}" for alias in node.names)


def imported_modules(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for name in imported_names(module):
        candidates = (name, name.rpartition(".")[0])
        found |= {next((c for c in candidates if c in MODULES), "")} - {"", module}
    return found


def room(module: str) -> str:
    """The folder or file of the package that a module belongs to."""
    return module.removeprefix(f"{PACKAGE}.").partition(".")[0]


INSIDE = [module for module in MODULES if module != PACKAGE]


@pytest.mark.parametrize("module", INSIDE)
def test_every_module_stands_on_a_floor(module):
    assert room(module) in FLOOR_OF, f"give {room(module)} a floor in {Path(__file__).name}"


@pytest.mark.parametrize("module", INSIDE)
def test_imports_go_down_or_sideways(module):
    floor = FLOOR_OF.get(room(module), len(FLOORS))
    above = [
        name
        for name in imported_modules(module)
        if name != PACKAGE and FLOOR_OF.get(room(name), len(FLOORS)) > floor
    ]
    assert not above, f"{module} stands on floor {floor}"


def test_the_package_itself_imports_nothing():
    assert list(imported_names(PACKAGE)) == []


def test_no_import_cycles():
    graph = {module: imported_modules(module) for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle


def test_checkpoints_know_nothing_of_growth():
    offenders = [
        (module, name)
        for module in INSIDE
        if room(module) == "checkpoint"
        for name in imported_modules(module)
        if room(name) == "growth"
    ]
    assert not offenders


def test_only_the_engine_imports_deepspeed():
    importers = {
        module
        for module in MODULES
        for name in imported_names(module)
        if name.split(".")[0] == "deepspeed"
    }
    assert importers <= {f"{PACKAGE}.engine.engine"}


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.config", f"{PACKAGE}.growth.plan"])
def test_imports_without_torch(module):
    code = f"import sys, {module}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "deepspeed", "megatron"} & set(result.stdout.split())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines"
    long = {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long
