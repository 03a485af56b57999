#!/usr/bin/env python3
"""One training step beside other trainers: the same model, the same batches, in turns.

python tools/bench/training/step.py [--shape small] [--dtypes bf16 fp32] [--peers NAME ...]
                                    [--rounds 7] [--device cpu] [--profile] [--json FILE]

Each trainer is a process of one rank that waits while the others run.  On a CPU the time is the
process's own, on one thread; on CUDA the clock's, from an idle device to an idle device.  Their
losses over the first steps must agree; figures are named ``unequal`` where these do not.  A figure
is the median of the rounds.  The share of its time that a trainer would need at the rate of large
products, measured in the same call, is its ``mfu``.  Exit code 1: losses differ, or a trainer
failed and was left out.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch

from lag_megatron.distributed.world import peak_flops
from tools.bench.common.figures import write_figures
from tools.bench.training.step_job import SHAPES, StepJob, write_weights
from tools.bench.training.step_peers import PEERS, matmul_rate, serve

STEPS = 3  # of a round
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}


def main() -> int:
    options = _parser().parse_args()
    figures: dict[str, float] = {}
    as_asked = True
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        _in_new_process(write_weights, options.shape, weights, options.device)
        for dtype in options.dtypes:
            names = ("ours", *(options.peers or SHAPES[options.shape].peers))
            times, are_same = _measure(options, dtype, weights, names)
            found = _report(times, dtype, options)
            figures |= found if are_same else {f"unequal_{k}": v for k, v in found.items()}
            as_asked = as_asked and are_same and times.keys() == set(names)
    if options.json:
        write_figures(options.json, figures)
    return int(not as_asked)


def _measure(
    options: argparse.Namespace, dtype: str, weights: Path, names: Sequence[str]
) -> tuple[dict[str, float], bool]:
    """Median seconds of each trainer's step, without those that failed; whether losses agree."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        ours, theirs = context.Pipe()
        job = StepJob(options.shape, dtype, weights, options.device, profile=options.profile)
        processes.append(context.Process(target=serve, args=(name, job, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[name] = ours
    losses = {name: found for name in names if (found := _first_losses(name, pipes[name]))}
    pipes = {name: pipes[name] for name in losses}
    if "ours" not in pipes:
        raise SystemExit("this project's own trainer failed: there is nothing to compare.")
    are_same = _are_same(losses, TOLERANCE[dtype])
    rounds: dict[str, list[float]] = {name: [] for name in pipes}
    for number in range(1 + options.rounds):
        for name, pipe in pipes.items():
            seconds, _ = _run(pipe, STEPS)
            if number:  # the first warms up
                rounds[name].append(statistics.fmean(seconds))
    for name, process in zip(names, processes, strict=True):
        if name in pipes:
            pipes[name].send(0)
        process.join()  # one after the other: it may have a profile to take
    return {name: statistics.median(values) for name, values in rounds.items()}, are_same


def _first_losses(name: str, pipe: Connection) -> list[float] | None:
    """A trainer's first losses; None if it failed, e.g. out of memory, after it has printed why."""
    try:
        pipe.recv()  # it stands
        return _run(pipe, STEPS)[1]
    except (EOFError, ConnectionError):
        print(f"{name}: ended before its first steps were done", flush=True)
        return None


def _run(pipe: Connection, steps: int) -> tuple[list[float], list[float]]:
    pipe.send(steps)
    seconds, losses = pipe.recv()
    return seconds, losses


def _are_same(losses: dict[str, list[float]], tolerance: float) -> bool:
    """Whether all losses agree with the first trainer's; if not, they are shown."""
    first = next(iter(losses.values()))
    same = all(
        math.isclose(a, b, rel_tol=tolerance)
        for found in losses.values()
        for a, b in zip(first, found, strict=True)
    )
    if not same:
        print(f"losses differ by more than {tolerance}: {json.dumps(losses)}", flush=True)
    return same


def _report(times: dict[str, float], dtype: str, options: argparse.Namespace) -> dict[str, float]:
    shape, device = options.shape, options.device
    prefix = "" if shape == "small" else f"{shape}_"
    figures = {f"{prefix}{device}_{dtype}_{name}_ms": 1e3 * value for name, value in times.items()}
    others = {name: value for name, value in times.items() if name != "ours"}
    for name, value in others.items():
        figures[f"{prefix}{device}_{dtype}_vs_{name}"] = value / times["ours"]
    if others:
        figures[f"{prefix}{device}_{dtype}_vs_best"] = min(others.values()) / times["ours"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rate = pool.apply(matmul_rate, (device, dtype))
    flops = StepJob(shape, dtype, Path(), device, profile=False).flops
    figures[f"{prefix}{device}_{dtype}_matmul_tflops"] = rate / 1e12
    for name, value in times.items():
        figures[f"{prefix}{device}_{dtype}_{name}_mfu"] = flops / value / rate
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    if peak is not None and dtype == "bf16":
        figures[f"{prefix}{device}_{dtype}_mfu"] = flops / times["ours"] / peak
    if shape == "small_bert" and "stock" in others:  # whose head makes logits of every token
        figures["bert_step_speedup"] = others["stock"] / times["ours"]
    for name, value in figures.items():
        print(f"{name:<28} {value:10.3f}", flush=True)
    return figures


def _in_new_process(function: object, *arguments: object) -> None:
    """Call a function in a process of its own, so that trainers start from the same state."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument(
        "--peers", nargs="+", choices=sorted(PEERS.keys() - {"ours"}), help="all by default"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--profile", action="store_true", help="print where each one's time goes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    raise SystemExit(main())
