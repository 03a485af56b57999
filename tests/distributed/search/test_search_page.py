"""The search of docs/api.md over engines of DeepSpeed: run through, and killed and continued."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

TITLE = "## A whole search with DeepSpeed"
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(folder):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    code = page[page.index(TITLE) :].partition("```python\n")[2].partition("```")[0]
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(code, encoding="utf-8")
    return subprocess.Popen(
        [*LAUNCH, "program.py"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def journal(folder):
    file = folder / "search" / "journal.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def decision(folder):
    found = json.loads((folder / "search" / "growth01" / "decision.json").read_text())
    return {key: found[key] for key in ("chosen", "candidates", "ties", "lag")}


def finish(process):
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_search_ends_in_the_same_decision(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    output = finish(start(calm))
    expected = decision(calm)
    assert len(expected["candidates"]) == 4
    assert f"best: {expected['chosen']} " in output
    process = start(killed)
    until = time.monotonic() + 200
    while sum(line["event"] == "probe_started" for line in journal(killed)) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "no third trial was begun in time"
        time.sleep(0.05)
    tree = psutil.Process(process.pid)
    for one in (
        *tree.children(recursive=True),
        tree,
    ):  # torchrun's ranks have sessions of their own
        one.kill()
    process.communicate()
    finish(start(killed))
    assert decision(killed) == expected
