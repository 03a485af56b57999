"""Small files are read by ``small_files`` alone, so that each mistake in one names the file."""

import ast

import pytest
from layers import MODULES, PACKAGE, parse

READER = f"{PACKAGE}.small_files"
READING = {
    *("json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.load_all"),
    *("yaml.safe_load_all", "tomllib.load", "tomllib.loads"),
}
READING_METHODS = ("read_text", "open_text")
# Modules that read otherwise, and why.
EXCEPTIONS = {
    "checkpoint.writer.progress_log": "a damaged line means only that a part is written again",
    "engine.base_cache": "the kernel's /proc/meminfo",
    "evaluation.harness": "task files of this package, with YAML tags of the harness",
    "kernels.common.build": "sources of this package, and the kernel's /proc/cpuinfo",
    "run.signals": "the kernel's /proc/<pid>/stat",
    "run.wandb_environment": "netrc, where any damage means no key",
    "search.rpc": "messages between processes of one run, not files",
    "study.launch": "the end of a log, shown as it is",
}


def readings(module: str) -> list[str]:
    """The calls in a module that read a small file or take a text apart."""
    found = []
    for node in ast.walk(parse(MODULES[module])):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        call = ast.unparse(node.func)
        copies = node.args and ast.unparse(node.args[0]).startswith("json.dumps(")
        if node.func.attr in READING_METHODS or (call in READING and not copies):
            found.append(f"{MODULES[module]}:{node.lineno} {call}")
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if m != READER])
def test_no_other_module_reads_small_files(module):
    found = readings(module)
    if module.removeprefix(f"{PACKAGE}.") in EXCEPTIONS:
        assert found, f"{module} reads none any more: take it out of EXCEPTIONS"
    else:
        assert not found, "use lag_megatron.small_files"


def test_exceptions_are_modules():
    assert {f"{PACKAGE}.{name}" for name in EXCEPTIONS} <= set(MODULES)
