"""A wheel does each command's job outside of the checkout, in front of this environment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
TINY = {
    "model": "{family: gpt, num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, "
    "num_attention_heads: 2, num_query_groups: 2, seq_length: 32, vocab_size: auto, positions: "
    "learned, norm: layernorm, activation: gelu, bias: true, tied_embeddings: true}",
    "data": "{source: prepared, paths: [prepared], validation_tokens: 256}",
    "parallel": "{micro_batch: 2, global_batch: 4}",
    "stages": "[{steps: 2}]",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's files, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("lag_megatron", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", str(source), *build, "-w", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), wheel], check=True)
    return target


@pytest.fixture(scope="module")
def job(installed, tmp_path_factory):
    """Runs a console command in a folder of its own, and returns its output."""
    folder = tmp_path_factory.mktemp("elsewhere")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "again"]
    lines = [" ".join(words[i % 10 :] + words[: i % 7]) for i in range(3000)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (folder / "wikitext.txt").write_text(" = Title = \n\n the quick brown fox \n")
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}

    def run(command, *arguments, launcher=()):
        done = subprocess.run(
            [*launcher, *([] if launcher else [str(installed / "bin" / command)]), *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        for warning in ("Warning", "Apex", "Transformer Engine"):
            assert warning not in done.stdout + done.stderr
        return done.stdout

    run.folder = folder
    return run


def test_each_command(job, installed):
    where = [sys.executable, "-c", "import lag_megatron; print(lag_megatron.__file__)"]
    assert Path(job("", launcher=where).strip()).is_relative_to(installed)
    assert "\ndemo " in job("lag-train", "--list-configs")
    prepare = ["--source", "jsonl", "--paths", "text.jsonl", "--vocab-size", "300"]
    job("lag-prepare-data", *prepare, "--output", "prepared", "--workers", "1")
    settings = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    assert "stage 0" in job("lag-train", "--config", "demo", *settings, "--dry-run")
    job("lag-train", "--config", "demo", *settings)
    (tag,) = (job.folder / "runs" / "demo").glob("stage00/step*")
    assert "2 layers" in job("lag-inspect", str(tag), "--verify")
    plan = ["--operator", "last", "--layers", "3"]
    job("lag-grow", str(tag), "grown", *plan)
    job("lag-respread", "grown", "moved", "--world-size", "2", "--zero-stage", "2")
    moved = job("lag-inspect", "moved")
    assert "3 layers" in moved
    assert "2 data-parallel" in moved
    job("lag-convert", "moved", "model", "--to", "hf")
    assert "report.html" in job("lag-report", "runs/demo")
    job("lag-evaluate", "runs/demo", "--tasks", "wikitext", "--data", "wikitext=wikitext.txt")
    assert "reproduced" in job("lag-plan-stages")
    assert "raptr" in job("lag-compare-policies", "studies/raptr_bert_small", "--dry-run")


@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m"],
        [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--module"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_launchers_take_the_module(launcher, job):
    done = job("", "lag_megatron.cli.train", "--config", "demo", "--dry-run", launcher=launcher)
    assert "stage 1" in done
