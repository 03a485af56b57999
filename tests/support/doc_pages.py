"""Blocks of the documents' pages, and a checkout-like folder in which a page's commands run.

A ```sh block has targets of the Makefile, which continuous integration runs or which set up.
A ```bash block runs, unless ``<!-- cluster -->`` stands right before it: it then needs a cluster,
a GPU or the network.  ``<!-- slow -->`` under the title: the page's run takes more than 10 s.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from console_commands import entry_points

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_TEST = ("api",)  # tests/unit/api/test_api_page.py and others run its programs
LANGUAGES = ("bash", "sh", "python", "yaml", "text", "json")
CLUSTER, SLOW = "<!-- cluster -->", "<!-- slow -->"
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_LINKED = (
    "Makefile",
    "README.md",
    "configs",
    "docs",
    "lag_megatron",
    "launch",
    "setup.py",
    "tools",
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``line`` is that of its first line of text, from 1."""

    page: Path
    language: str
    text: str
    line: int
    needs_cluster: bool

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        found.append(
            Block(
                page,
                fence["language"],
                re.sub(rf"^{fence['indent']}", "", fence["text"], flags=re.M),
                before.count("\n") + 2,
                before.rstrip().endswith(CLUSTER),
            )
        )
    return found


def is_slow(page: Path) -> bool:
    """Whether the first line after the title says so."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line]
    return SLOW in lines[1:2]


def write_commands(folder: Path) -> None:
    """A program for each console command, so that nothing has to be installed."""
    folder.mkdir()
    for name, target in entry_points().items():
        module, _, function = target.partition(":")
        code = (
            f"import sys; from {module} import {function}; "
            f"sys.argv[0] = {name!r}; sys.exit({function}())"
        )
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(code)} "$@"\n')
        program.chmod(0o755)


def run_page(page: Path, folder: Path, *, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a page's commands and Python programs in one shell, in their order, in ``folder``."""
    checkout = folder / "checkout"
    checkout.mkdir(parents=True)
    for name in _LINKED:
        (checkout / name).symlink_to(ROOT / name)
    write_commands(folder / "bin")
    script = ["set -euo pipefail"]
    for number, block in enumerate(blocks_of(page)):
        if block.needs_cluster or block.language not in ("bash", "python"):
            continue
        script.append(f"echo '== {block.where}' >&2")
        if block.language == "bash":
            script.append(block.text)
        else:
            program = folder / f"block_{number}.py"
            program.write_text(block.text)
            script.append(f"python {shlex.quote(str(program))}")
    path = os.pathsep.join(
        [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    return subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=checkout, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
