#!/usr/bin/env python3
"""An activation with its bias in one pass against torch's operations and those that it compiles.

python tools/bench/elementwise.py [--rounds 9] [--json FILE]

One thread, process time, medians of rounds in turns, forward and backward.  A figure is how much
faster one pass is than the fastest of the others; `one_pass_wins` in
`lag_megatron/kernels/activation.py` says where it is taken.  It has no form for CUDA that was
measured, so that this runs on a CPU alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import write_figures
from torch import Tensor

from lag_megatron.kernels.activation import KINDS, activate, activate_by_torch

SHAPES = ((256, 512), (1024, 1024), (4096, 3072))  # tokens and width of the MLP

Form = Callable[[Tensor, Tensor, str], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            for shape in SHAPES:
                times = _times(kind, dtype, shape, rounds=options.rounds)
                name = f"{kind}_{str(dtype).removeprefix('torch.')}_{shape[0]}x{shape[1]}"
                figures |= {f"{name}_{form}_ms": 1e3 * value for form, value in times.items()}
                figures[name] = min(times["torch"], times["compiled"]) / times["one_pass"]
                row = " ".join(f"{1e3 * value:9.3f}" for value in times.values())
                print(f"{name:<28} {row} ms {figures[name]:8.2f}", flush=True)
    if options.json:
        write_figures(options.json, figures)
    return 0


def _times(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], *, rounds: int
) -> dict[str, float]:
    """Median seconds of each form."""
    torch.compiler.reset()  # or the number of shapes compiled for would meet its limit
    forms: dict[str, Form] = {
        "one_pass": activate,
        "torch": activate_by_torch,
        "compiled": torch.compile(activate_by_torch, dynamic=False),
    }
    rows, width = shape
    inner = width * (2 if kind == "swiglu" else 1)
    sizes = ((rows, inner), (inner,))
    hidden, bias = (torch.randn(size).to(dtype).requires_grad_() for size in sizes)
    grad = torch.randn(shape).to(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(2 + rounds):
        for name, form in forms.items():
            hidden.grad = bias.grad = None
            started = time.process_time()
            form(hidden, bias, kind).backward(grad)
            if number > 1:  # the first ones compile and warm up
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    raise SystemExit(main())
