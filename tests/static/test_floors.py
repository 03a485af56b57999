"""The architecture, read from the source: who may import whom, and how long things may be."""

import ast
import graphlib
import subprocess
import sys
import tomllib

import pytest
from layers import (
    GRAPH,
    LAYER_OF,
    LAYERS,
    MODULES,
    PACKAGE,
    ROOT,
    TABLE_FILE,
    arrows,
    imported_names,
    is_package,
    members,
    package_of,
    parse,
    parts_within,
    top_arrows,
    with_table,
)

SOURCES = sorted(
    p for folder in (PACKAGE, "tools", "launch") for p in (ROOT / folder).rglob("*.py")
)
INSIDE = [module for module in MODULES if module != PACKAGE]
WITH_SUB_PACKAGES = [
    module
    for module in INSIDE
    if is_package(module) and any(is_package(member) for member in members(module))
]
LOOSE = {"errors", "atomic_io", "small_files", "api"}
STRICT = {
    *(
        "errors",
        "atomic_io",
        "process",
        "small_files",
        "targets",
        "config",
        "planning",
        "selection",
    ),
    "checkpoint",
    *(
        "growth",
        "run",
        "api",
        "cli",
        "distributed.heartbeat",
        "distributed.watchdog",
        "distributed.channel",
    ),
}
WITHOUT_TORCH = ["", "config", "planning", "selection", "run", "growth.plan", "growth.pool"]
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50


@pytest.mark.parametrize("module", INSIDE)
def test_every_package_has_a_layer(module):
    assert package_of(module) in LAYER_OF, f"give {package_of(module)} a layer in layers.py"


def test_every_layer_has_packages_that_exist():
    assert {package_of(module) for module in INSIDE} == set(LAYER_OF)


def test_few_modules_lie_at_the_root():
    loose = {m.removeprefix(f"{PACKAGE}.") for m in members(PACKAGE) if not is_package(m)}
    assert loose == LOOSE


@pytest.mark.parametrize("module", INSIDE)
def test_imports_go_down_or_sideways(module):
    layer = LAYER_OF[package_of(module)]
    above = [name for name in GRAPH[module] - {PACKAGE} if LAYER_OF[package_of(name)] > layer]
    assert not above, f"{module} stands on layer {layer}"


def test_no_packages_import_each_other():
    list(graphlib.TopologicalSorter(top_arrows()).static_order())  # raises CycleError, naming it


@pytest.mark.parametrize("package", WITH_SUB_PACKAGES)
def test_imports_within_a_package_go_one_way(package):
    """Its own modules count as one part, beside its sub-packages."""
    graph = arrows(parts_within(package))
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle


def test_no_modules_import_each_other():
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, naming the cycle


def test_the_package_itself_imports_nothing():
    assert set(imported_names(PACKAGE)) == {"importlib", "typing.Any"}


def test_only_the_engine_imports_deepspeed():
    importers = {
        module
        for module in MODULES
        for name in imported_names(module)
        if name.split(".")[0] == "deepspeed"
    }
    assert {package_of(module) for module in importers} == {"engine"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_imports_without_torch(name):
    module = f"{PACKAGE}.{name}".rstrip(".")
    inner = [m for m in MODULES if m == module or m.startswith(f"{module}.")] if name else [module]
    code = f"import sys, {', '.join(inner)}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "deepspeed", "megatron"} & set(result.stdout.split())


def test_types_are_strict_where_the_layers_ask_for_it():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    (strict,) = [o for o in settings["overrides"] if o.get("disallow_untyped_defs")]
    wanted = {
        f"{PACKAGE}.{name}.*" if f"{PACKAGE}.{name}" in MODULES and is_package(f"{PACKAGE}.{name}")
        else f"{PACKAGE}.{name}"
        for name in STRICT
    }  # fmt: skip
    assert set(strict["module"]) == wanted


def test_the_documents_show_the_layers():
    text = TABLE_FILE.read_text(encoding="utf-8")
    assert text == with_table(text), "run python tests/static/layers.py --write"


def test_layers_name_each_package_once():
    assert len(LAYER_OF) == sum(len(names) for names, _ in LAYERS)


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
