"""A whole study of two arms: trained, resumed without doing anything twice, reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def compare(study, *options):
    """The tool as a user would start it."""
    command = [sys.executable, str(ROOT / "tools" / "compare_policies.py"), str(study), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow  # two trainings with the imports of torch and DeepSpeed
def test_two_arms_cost_what_was_planned(tiny, tmp_path):
    stages = [{"steps": 6}, {"steps": 4, "num_layers": 3}]
    study = {
        "base": tiny.name,
        "seeds": [3],
        "budget": {"of": "lag"},
        "reference": "scratch",
        "arms": {
            "lag": {"model": {"vocab_size": 384}, "stages": stages},
            "scratch": {"model": {"vocab_size": 384, "num_layers": 3}, "stages": [{"steps": 1}]},
        },
        "learning_rates": {"decayed": {"optimizer": {"schedule": {"name": "wsd"}}}},
    }
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(study))
    done = compare(path, "--out", str(out), "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert not results["missing"]
    for run in results["runs"]:
        assert run["flops"] == run["planned_flops"] <= results["budget"]["flops"]
        assert run["search_flops"] == run["planned_search_flops"]
        assert run["seconds"] > 0
    [lag, scratch] = results["runs"]
    assert lag["flops"] == results["budget"]["flops"]
    assert lag["all_tokens"] > lag["tokens"]
    assert scratch["all_tokens"] == scratch["tokens"]
    assert (out / "report.html").is_file()

    again = compare(path, "--out", str(out))
    assert again.returncode == 0
    assert "2 finished" in again.stdout
    assert "started" not in again.stdout


def test_a_users_mistake_is_one_message(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {}")
    path = tmp_path / "study.yaml"
    path.write_text("base: base.yaml\nseeds: []\nbudget: {}\nreference: a\narms: {b: {}}\n")
    done = compare(path, "--dry-run")
    assert done.returncode == 2
    assert "3 problems in" in done.stderr
    assert "Traceback" not in done.stderr
    assert compare(path, "--dry-run", "--workers", "x").returncode == 2
