#!/usr/bin/env python3
"""Everything that is measured on a GPU; gpu.sh calls it.

Parts run one after the other, each in its own process and with its own time limit.  A part that
fails is reported, and the others still run.  Exit code 0: all passed; 1: not all; 2: no GPU.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch

from lag_megatron.run.compile_cache import set_cache_dirs
from tools.bench.common.figures import record
from tools.bench.common.timing import device_prefix

ROOT = Path(__file__).resolve().parents[3]
BENCH = ROOT / "tools" / "bench"
KEPT, SHOWN = 100_000, 6_000  # characters of a part's output, its last ones: in the file, and here
GRACE = 5.0  # seconds in which a part whose time is over may say where it was


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the bench.

    Attributes:
        name: its name in the result file.
        seconds: its time limit.
        command: arguments of the Python interpreter.
        has_figures: whether it takes ``--json FILE``.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    has_figures: bool = True


def _step(shape: str, rounds: int) -> tuple[str, ...]:
    options = ("--dtypes", "bf16", "--device", "cuda", "--rounds", str(rounds))
    return (str(BENCH / "training" / "step.py"), "--shape", shape, *options, "--peers", "stock")


def gpu_tests() -> tuple[str, ...]:
    """Files with a test marked ``gpu``; unit tests first, since others may need what is missing."""
    tests = ROOT / "tests"
    found = [f for f in tests.rglob("test_*.py") if "mark.gpu" in f.read_text(encoding="utf-8")]
    return tuple(str(f) for f in sorted(found, key=lambda f: (tests / "unit" not in f.parents, f)))


PARTS = (
    Part(
        "tests",
        150,
        ("-m", "pytest", "-m", "gpu", "-q", "--tb=short", *gpu_tests()),
        has_figures=False,
    ),
    Part("kernels", 70, (str(BENCH / "gpu" / "gpu_kernels.py"),)),
    Part("step of BERT-base, 16 layers", 90, _step("bert16", 10)),
    Part("step of a 1B decoder", 140, _step("decoder1b", 5)),
    Part(
        "switch of candidates",
        100,
        (str(BENCH / "growth" / "live_switch.py"), "--hidden", "768"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", default=BENCH / "results" / "gpu.json")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[p.name for p in PARTS])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu.sh: no GPU is here, so there is nothing to measure.", file=sys.stderr)
        return 2
    set_cache_dirs(ROOT)
    device = torch.cuda.get_device_name()
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for found in run_parts(parts, prefix=device_prefix(device)):  # each is kept: the next may hang
        options.json.write_text(json.dumps({**found, "machine": device}, indent=1))
    print(f"\n{table(found)}\n\nwritten to {options.json}")
    return exit_code(found)


def run_parts(parts: Sequence[Part], *, prefix: str) -> Iterator[dict[str, Any]]:
    """The content of the result file after each part: figures so far, outcomes of the parts."""
    figures: dict[str, float] = {}
    outcomes: dict[str, dict[str, Any]] = {}
    for part in parts:
        print(f"--- {part.name} (at most {part.seconds:g} s)", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figures.json"
            command = [*part.command, *(("--json", str(file)) if part.has_figures else ())]
            outcomes[part.name] = outcome = _run(
                [sys.executable, *command], part.seconds, Path(folder) / "output"
            )
            figures |= renamed(left := _read_figures(file), prefix)
            if part.has_figures and not left and outcome["outcome"] == "passed":
                outcome["outcome"] = "left no figures"
        print(
            f"{outcome['output'][-SHOWN:]}\n{outcome['outcome']}, {outcome['seconds']:.0f} s",
            flush=True,
        )
        yield {**record(figures), "parts": dict(outcomes)}


def _read_figures(file: Path) -> dict[str, float]:
    """The figures that a part wrote; none if it ended before or while it wrote."""
    try:
        found: dict[str, float] = json.loads(file.read_text())["figures"]
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found


def renamed(figures: dict[str, float], prefix: str) -> dict[str, float]:
    """Figures by the device's name: ``bert16_cuda_bf16_mfu`` becomes ``h200_bert16_mfu``."""
    short = {name.replace("cuda_bf16_", ""): value for name, value in figures.items()}
    return {
        name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
        for name, value in short.items()
    }


def exit_code(found: dict[str, Any]) -> int:
    return int(any(part["outcome"] != "passed" for part in found["parts"].values()))


def table(found: dict[str, Any]) -> str:
    """The outcome of each part, and the figures."""
    rows = [
        f"{name:<44} {part['outcome']:>12} {part['seconds']:8.0f} s"
        for name, part in found["parts"].items()
    ]
    rows += [f"{name:<52} {value:12.4f}" for name, value in sorted(found["figures"].items())]
    return "\n".join(rows)


def _run(command: Sequence[str], seconds: float, log: Path) -> dict[str, Any]:
    """Run a command; after ``seconds`` end it and all processes that it started.

    SIGINT comes first, so that Python prints where it was, and pytest what has failed so far.
    """
    started = time.perf_counter()
    with log.open("wb") as file:  # no pipe, which what it starts could hold open
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        code = process.wait(timeout=seconds)
        outcome = f"failed ({code})" if code else "passed"
    except subprocess.TimeoutExpired:
        outcome = "out of time"
        _signal(process, signal.SIGINT)
    finally:  # a key that ends this program does not reach what it started
        _signal(process, signal.SIGKILL)
    taken = time.perf_counter() - started
    output = log.read_text(encoding="utf-8", errors="replace")
    return {"outcome": outcome, "seconds": taken, "output": output[-KEPT:].strip()}


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to a process and all that it started, and wait up to ``GRACE`` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE)


if __name__ == "__main__":
    raise SystemExit(main())
