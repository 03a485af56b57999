"""The architecture as data, and the import graph that is read from the source.

python tests/static/layers.py           # counts of packages, layers, arrows and modules
python tests/static/layers.py --write   # writes the table of CONTRIBUTING.md
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "lag_megatron"
TABLE_FILE = ROOT / "CONTRIBUTING.md"
TABLE_MARKS = ("<!-- layers: tests/static/layers.py -->", "<!-- end of layers -->")

# From the lowest layer up: what stands there, and what it holds.
LAYERS = (
    (
        ("errors", "atomic_io", "small_files", "targets"),
        "messages; small files, read and checked, written whole or not at all; locks of targets",
    ),
    (("config", "planning", "selection"), "values, schedules, costs, ranking and rules; no torch"),
    (("checkpoint",), "formats: what is on disk, read and written; knows nothing of growth"),
    (
        ("growth", "distributed", "kernels", "model", "data", "run"),
        "plans and how they are applied; process groups; Megatron-Core models; text; the run "
        "directory (`run`: no torch)",
    ),
    (("engine",), "the DeepSpeed engine; no other package imports deepspeed"),
    (
        ("search", "report"),
        "one growth event: coordinator, workers, decision; the report of a run directory",
    ),
    (
        ("training", "evaluation", "study"),
        "the loop over stages, and what is made of a run directory",
    ),
    (("api",), "what a program imports: `import lag_megatron as lag`"),
    (("cli",), "one module a command: parse, call the library"),
)
LAYER_OF = {name: layer for layer, (names, _) in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


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


GRAPH = {module: imported_modules(module) for module in MODULES}


def package_of(module: str) -> str:
    """The package, or module, right below ``lag_megatron`` that a module belongs to."""
    return module.removeprefix(f"{PACKAGE}.").partition(".")[0]


def is_package(module: str) -> bool:
    return MODULES[module].name == "__init__.py"


def members(package: str) -> list[str]:
    """The modules and packages right below a package."""
    return [m for m in MODULES if m.rpartition(".")[0] == package and m != package]


def arrows(part_of: dict[str, str]) -> dict[str, set[str]]:
    """The imports between parts, given the part of each module that counts."""
    found: dict[str, set[str]] = {part: set() for part in part_of.values()}
    for module, part in part_of.items():
        found[part] |= {part_of[other] for other in GRAPH[module] if other in part_of} - {part}
    return found


def top_arrows() -> dict[str, set[str]]:
    """Which packages each package imports."""
    return arrows({module: package_of(module) for module in MODULES if module != PACKAGE})


def parts_within(package: str) -> dict[str, str]:
    """The part of a package's modules: a sub-package's name, or ``.`` for its own modules."""
    inner = [m for m in members(package) if is_package(m)]
    return {
        module: next((i for i in inner if module == i or module.startswith(f"{i}.")), ".")
        for module in MODULES
        if module == package or module.startswith(f"{package}.")
    }


def counts() -> dict[str, int]:
    """The size of the architecture."""
    packages = [m for m in MODULES if is_package(m)]
    siblings = Counter(m.rpartition(".")[0] for m in MODULES if not is_package(m))
    return {
        "modules": len(MODULES) - len(packages),
        "packages": len(packages),
        "parts right below the root": len(members(PACKAGE)),
        "layers": len(LAYERS),
        "arrows between parts below the root": sum(map(len, top_arrows().values())),
        "modules loose at the root": siblings[PACKAGE],
        "most modules side by side": max(siblings.values()),
    }


def table() -> str:
    """The layers as the table of the documents, the lowest first."""
    rows = [
        f"| {layer} | {', '.join(f'`{name}`' for name in names)} | {what} |"
        for layer, (names, what) in enumerate(LAYERS)
    ]
    return "\n".join(["| layer | packages | what |", "|--:|---|---|", *rows])


def with_table(text: str) -> str:
    """A document with the table between its marks."""
    before, _, rest = text.partition(TABLE_MARKS[0])
    _, _, after = rest.partition(TABLE_MARKS[1])
    return f"{before}{TABLE_MARKS[0]}\n{table()}\n{TABLE_MARKS[1]}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        TABLE_FILE.write_text(with_table(TABLE_FILE.read_text()))
    for name, count in counts().items():
        print(f"{count:5d}  {name}")
