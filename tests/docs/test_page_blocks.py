"""What the documents show is right, as far as that can be told without running it."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT
from doc_commands import commands_of, module_of, options_of
from doc_config import config_problems
from doc_pages import LANGUAGES, PAGES, blocks_of, is_slow

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pages
def test_every_block_has_a_language(page):
    fences = [
        line for line in page.read_text(encoding="utf-8").splitlines() if "```" in line.lstrip()[:3]
    ]
    blocks = blocks_of(page)
    assert len(fences) == 2 * len(blocks)
    assert [block.where for block in blocks if block.language not in LANGUAGES] == []


@pages
def test_commands_are_shell(page):
    for block in blocks_of(page):
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.where}: {done.stderr}"


@pages
def test_targets_are_in_the_makefile(page):
    made = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks_of(page):
        if block.language == "sh":
            for line in block.text.splitlines():
                program, target = line.split()[:2]
                assert (program, f"\n{target}:" in made) == ("make", True), block.where


@pages
def test_commands_have_their_options(page):
    wrong = []
    for block in blocks_of(page):
        for words in commands_of(block.text) if block.language == "bash" else ():
            started = module_of(words)
            if started is None:
                continue
            module, arguments = started
            assert module.is_file(), f"{block.where}: {module} does not exist"
            given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            wrong += [f"{block.where}: {name}" for name in given - options_of(module)]
    assert wrong == []


@pages
def test_configurations_fit_the_schema(page):
    for block in blocks_of(page):
        if block.language == "yaml":
            assert config_problems(block.text) == [], block.where


def test_the_checks_see_mistakes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n<!-- slow -->\n\n<!-- cluster -->\n```bash\nlag-grow a b \\\n  --layer 3\n```\n\n"
        "```\n```\n"
    )
    command, unnamed = blocks_of(page)
    assert command.needs_cluster
    assert not unnamed.needs_cluster
    assert (command.line, unnamed.language) == (6, "")
    assert is_slow(page)
    (words,) = commands_of(command.text)
    module, arguments = module_of(words)
    assert arguments == ["a", "b", "--layer", "3"]
    assert "--layer" not in options_of(module)
    assert {"--layers", "--workers"} <= options_of(module)
    assert config_problems("stages: [{step: 3}]")
    assert config_problems("stages: {policy: last, layer: [4]}")
    assert config_problems("optimizer: {lr: fast}")
    assert config_problems('roles: {"*.weight": weight}')
    assert config_problems("stages: [{steps: 3}]\nstages: [{step: 3}]")
    assert not config_problems("optimizer: {lr: 0.1}\ngrowth:\n  lag: 40")


def test_the_readme_is_one_screen():
    assert (ROOT / "README.md").stat().st_size <= 8 * 1024


def messages():
    """All texts of the package, with ``{}`` in place of values."""
    for path in sorted((ROOT / "lag_megatron").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                yield node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            elif isinstance(node, ast.ClassDef):
                yield node.name


def test_errors_are_listed_by_texts_that_are_printed():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("## Errors by their text")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    texts = [text for row in rows for text in re.findall("`([^`]+)`", row.split(" | ")[0])]
    assert len(texts) >= len(rows) > 10
    printed = list(messages())
    assert [text for text in texts if not any(text in message for message in printed)] == []
