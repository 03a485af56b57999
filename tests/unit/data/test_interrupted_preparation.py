"""Ctrl-C while text is prepared by worker processes, which a terminal interrupts too."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT


def prepare(source, output):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "lag_megatron.cli.prepare_data", "--source", "text"),
            *("--paths", str(source), "--output", str(output), "--vocab-size", "300"),
            *("--workers", "2", "--chunk-mb", "0.01"),
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = [f"word{n}" for n in range(400)]
    choose = random.Random(1).choices
    for number in range(40):
        paragraphs = [" ".join(choose(words, k=60)) for _ in range(60)]
        (folder / f"{number}.txt").write_text("\n\n".join(paragraphs))
    return folder


@pytest.mark.slow
def test_it_ends_with_a_line_and_goes_on(text, tmp_path):
    whole = prepare(text, tmp_path / "whole")
    began = time.monotonic()
    whole.communicate(timeout=300)
    seconds = time.monotonic() - began
    assert whole.returncode == 0
    interrupted = 0
    for number in range(4):
        process = prepare(text, tmp_path / "again")
        time.sleep(seconds * (number + 1) / 5)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=120)
        assert process.returncode in (0, 130), error
        assert "Traceback" not in error
        interrupted += process.returncode == 130
    assert interrupted
    last = prepare(text, tmp_path / "again")
    last.communicate(timeout=300)
    assert last.returncode == 0
    for name in ("train.bin", "train.idx", "validation.bin", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
