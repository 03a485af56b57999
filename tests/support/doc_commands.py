"""Options that the documents' commands are given, and those that the programs have."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT
from console_commands import entry_points

_CLI = ROOT / "lag_megatron" / "cli"
_SEPARATORS = {";", "&&", "||", "|", "&"}


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each simple command of a script; a command may go on over lines."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in _SEPARATORS:
                yield words
                words = []
            else:
                words.append(word)
        yield words


def module_of(words: list[str]) -> tuple[Path, list[str]] | None:
    """The module of ``lag_megatron.cli`` that a command starts, and the arguments that it gets."""
    targets = entry_points()
    for place, word in enumerate(words):
        script = re.fullmatch(r"(?:tools|launch)/(\w+)\.py", word)
        named = re.fullmatch(r"lag_megatron\.cli\.(\w+)", word)
        name = targets[word].partition(":")[0].rpartition(".")[2] if word in targets else None
        found = name or (script or named or {1: None})[1]
        if found:
            return _CLI / f"{found}.py", words[place + 1 :]
    return None


def options_of(module: Path) -> set[str]:
    """Options that a module of ``lag_megatron.cli`` names, or one that it imports from there."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    found = {"--help"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^--[\w-]+$", node.value))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "lag_megatron.cli."
        ):
            imported = _CLI.joinpath(*node.module.split(".")[2:]).with_suffix(".py")
            if imported != module:
                found |= options_of(imported)
    return found
