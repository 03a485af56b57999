"""The examples of docs/api.md run as they stand there."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def examples():
    """Code by the heading that it stands under, the first heading's first."""
    page = PAGE.partition("## Search")[0]
    found = {}
    for section in re.split(r"^#+ ", page, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        found[title] = "".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    return {title: code for title, code in found.items() if code}


def test_the_examples_on_disk_are_one_program(tmp_path):
    code = "".join(text for title, text in examples().items() if "grow_engine" not in title)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[0, 1, 2, 3, 2, 3]" in done.stdout.splitlines()
    assert "cannot be split into tensor-parallel groups" in done.stdout
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
def test_the_example_of_grow_engine_under_a_launcher(tmp_path):
    (code,) = (text for title, text in examples().items() if "grow_engine" in title)
    (tmp_path / "program.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node=2", "program.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("4 lag") == 2
