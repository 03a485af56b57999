"""A run's console when the program that reads it has ended."""

import os
import subprocess
import sys

from conftest import ROOT

PROGRAM = """
from lag_megatron.run.metrics import Console
console = Console()
for number in range(3):
    console.print(f"line {number}")
    console.warn(f"warning {number}")
open("end", "w").close()
"""


def test_a_run_goes_on_when_its_tee_has_ended(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "warning 0\nwarning 1\nwarning 2\n")
    assert (tmp_path / "end").exists()
