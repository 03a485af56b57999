"""Each module that reads files of users or runs is claimed by a kind of the fuzzer."""

import ast

import pytest
from layers import MODULES, PACKAGE, ROOT, parse

FUZZ = ROOT / "tests" / "fuzz"
SMALL = f"{PACKAGE}.small_files"
CALLS = {
    *("torch.load", "safe_open", "np.load", "np.memmap", "np.fromfile", "IndexedDataset"),
    *("torch_pickle.load", "yaml.load", "yaml.safe_load", "json.load", "json.loads"),
    *("pickle.load", "pickle.loads", "_Unpickler"),
}
# Modules that read otherwise than for a user, and why no kind alters what they read.
EXCEPTIONS = {
    "checkpoint.writer.progress_log": "a damaged line means only that a part is written again",
    "cli.evaluate": "whether a file is a result, which may be overwritten; any damage says no",
    "cli.growth_options": "values on the command line",
    "data.datasets.verified_files": "a damaged list means only that a file is read again",
    "run.json_schema": "words for values that were read already",
    "search.rpc": "messages between processes of one run, not files",
}
# Readers that no kind alters yet.  Take a line out with the kind that covers it.
UNCOVERED = {
    *("checkpoint.megatron.legacy_reader", "data.datasets.checksums"),
    *("data.datasets.prepared_dataset", "data.prepare.readers", "data.prepare.sources"),
    *("data.prepare.staging_dir", "data.prepare.tokenize", "engine.ema", "evaluation.candidates"),
    *("planning.vocab_size", "search.ask_tell.search_directory"),
    *("evaluation.harness", "growth.apply.trainer_folder", "run.wandb_runs"),
}


def reads(module: str) -> bool:
    """Whether a module calls a reader, or imports one of ``small_files``."""
    for node in ast.walk(parse(MODULES[module])):
        if isinstance(node, ast.ImportFrom) and node.module == SMALL:
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            copies = node.args and ast.unparse(node.args[0]).startswith("json.dumps(")
            if not copies:
                return True
    return False


READERS = {m.removeprefix(f"{PACKAGE}.") for m in MODULES if m != SMALL and reads(m)}


@pytest.fixture(scope="module")
def claimed():
    """Modules that kinds claim, read from their source: building kinds takes seconds."""
    found = set()
    for path in FUZZ.glob("*_kinds.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and f"{PACKAGE}.{node.value}" in MODULES:
                found.add(node.value)
    return found


def test_each_reader_is_claimed_by_a_kind(claimed):
    missing = READERS - claimed - set(EXCEPTIONS) - UNCOVERED
    assert not missing, f"add a kind to tests/fuzz for {sorted(missing)}"


def test_exceptions_read_and_are_not_claimed(claimed):
    assert set(EXCEPTIONS) <= READERS - claimed
    assert READERS - claimed >= UNCOVERED
