"""tools/prepare_data.py as users call it: whole, in parts, and killed."""

import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT

from lag_megatron.cli import prepare_data as tool
from lag_megatron.config import load_config
from lag_megatron.data import prepare_data

CHUNK_MB = "0.0625"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    words = [f"{draw.choice('bcdfgl')}{draw.choice('aeiou')}{number}" for number in range(300)]
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    lines = (" ".join(draw.choices(words, k=draw.randint(5, 200))) for _ in range(1500))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def arguments(text: Path, output: Path, *more: str) -> list[str]:
    return ["--source", "jsonl", "--paths", str(text), "--vocab-size", "400", "--output",
            str(output), "--chunk-mb", CHUNK_MB, *more]  # fmt: skip


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert tool.main(arguments(text, output, "--workers", "1")) == 0
    return output


def test_it_says_what_it_made(text: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checksums(whole)
    assert tool.main(arguments(text, whole, "--workers", "1", "--show", "2", "--verify")) == 0
    shown = capsys.readouterr().out
    assert "1,485 documents to train on" in shown
    assert "all checksums are right" in shown
    assert "sample 1: causal" in shown
    assert checksums(whole) == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_and_kills_do_not_change_a_byte(text: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "tools/prepare_data.py", *arguments(text, output, "--workers", "2")]
    parts = tmp_path / "out.part" / "parts"
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        while process.poll() is None and not any(parts.glob("*.json")):
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert any(parts.glob("*.json"))
    assert not output.exists()
    wait_for_group(process.pid)
    (parts / "000000.train.bin").write_bytes(b"torn")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert checksums(output) == checksums(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def wait_for_group(group: int) -> None:
    """Workers end with their parent."""
    deadline = time.monotonic() + 60
    while alive := [process for process in psutil.process_iter() if in_group(process, group)]:
        assert time.monotonic() < deadline, f"outlived their parent: {alive}"
        time.sleep(0.05)


def in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False


def test_users_mistakes_are_reported(
    text: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*given: str) -> str:
        assert tool.main(list(given)) == 2
        return capsys.readouterr().err

    assert "give --config FILE" in error_of()
    assert "--output: is needed with --source" in error_of("--source", "stdlib")
    assert "--workers: expected" in error_of(*arguments(text, whole, "--workers", "0"))
    assert "says that already" in error_of("--config", "x.yaml", "--vocab-size", "300")
    assert "holds other prepared data" in error_of(*arguments(text, whole, "--seed", "5"))
    prepared = ("--source", "prepared", "--paths", str(whole))
    assert "prepared already" in error_of(*prepared, "--output", str(tmp_path))
    damaged = tmp_path / "corpus.jsonl"
    damaged.write_text(text.read_text() + '{"txt": 1}\n')
    found = error_of(*arguments(damaged, tmp_path / "out", "--workers", "1"))
    assert f"{damaged}:1501: got no such key" in found


def test_a_runs_mixture_goes_where_the_run_looks(
    text: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(9):
        (notes / f"{number}.txt").write_text(f"note {number} of nine\n" * 9)
    sources = [
        {"name": "lines", "weight": 0.75, "paths": [str(whole)]},
        {"name": "notes", "weight": 0.25, "source": "text", "paths": [str(notes)]},
    ]
    tree = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    tree["data"] |= {"mixture": sources, "validation_fraction": 0.2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    cache = tmp_path / "cache"
    assert tool.main(["--config", str(path), "--cache", str(cache), "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "lines: " in shown
    assert "notes: " in shown
    before = checksums(cache)
    made = prepare_data(load_config(path).data, cache_dir=cache)
    assert checksums(cache) == before
    assert [source.name for source in made.sources] == ["lines", "notes"]
    command = ["--config", str(path), "--cache", str(cache), "--workers", "1"]
    assert tool.main([*command, "--output", str(tmp_path / "out")]) == 0
    _, hint = capsys.readouterr().out.split("to train on it: ")
    assert "--set 'data.mixture=[]'" in hint
    settings = [word for word in shlex.split(hint) if word != "--set"]
    again = prepare_data(load_config(path, overrides=settings).data, cache_dir=cache)
    assert again.digest == made.digest
