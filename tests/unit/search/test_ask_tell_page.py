"""The example of docs/api.md runs as it stands there."""

import json
import subprocess
import sys

from conftest import ROOT


def test_the_example_of_the_api_page(tmp_path):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    section = page[page.index("## Search with your own training program") :]
    example = section.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # transformers brings DeepSpeed, which prints, where accelerate is installed.
    chosen, state, steps = done.stdout.splitlines()[-2].split()
    decision = json.loads((tmp_path / "search" / "growth01" / "decision.json").read_text())
    assert (chosen, steps) == (decision["chosen"], "40")
    assert "duplicate" in chosen
    assert (tmp_path / state / "model.json").is_file()
    assert (tmp_path / "search" / "report.html").is_file()
