#!/usr/bin/env python3
"""What lies between products: in one pass, by torch's operations, and as torch compiles these.

python tools/bench/elementwise.py [--rounds 9] [--json FILE]

One thread, process time, medians of rounds in turns, forward and backward.  Of an activation with
its bias a figure is how much faster one pass is than the fastest of the others; `one_pass_wins` in
`lag_megatron/kernels/activation.py` says where it is taken.  Of bias, dropout, residual and norm
after it there is no pass of ours: a figure is how much faster the compiled form is.  Nothing has a
form for CUDA that was measured, so that this runs on a CPU alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from figures import write_figures
from torch import Tensor

from lag_megatron.kernels.activation import KINDS, activate, activate_by_torch

SHAPES = ((256, 512), (1024, 1024), (4096, 3072))  # tokens and width of the MLP
NORMED = ((256, 128), (1024, 256), (4096, 768))  # tokens and width of the residual stream
DROPOUT = 0.1

Form = Callable[[Tensor, Tensor, str], Tensor]
T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}

    def note(name: str, times: dict[str, float], figure: float) -> None:
        figures.update({f"{name}_{form}_ms": 1e3 * value for form, value in times.items()})
        figures[name] = figure
        row = " ".join(f"{form} {1e3 * value:9.3f}" for form, value in times.items())
        print(f"{name:<32} {row} ms {figure:8.2f}", flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            for shape in SHAPES:
                times = _times(kind, dtype, shape, rounds=options.rounds)
                name = f"{kind}_{str(dtype).removeprefix('torch.')}_{shape[0]}x{shape[1]}"
                note(name, times, min(times["torch"], times["compiled"]) / times["one_pass"])
        for rate in (0.0, DROPOUT):
            for shape in NORMED:
                times = _norm_times(rate, dtype, shape, rounds=options.rounds)
                kind = f"{str(dtype).removeprefix('torch.')}_{shape[0]}x{shape[1]}"
                dropped = "dropout_" if rate else ""
                note(f"residual_{dropped}norm_{kind}", times, times["torch"] / times["compiled"])
    if options.json:
        write_figures(options.json, figures)
    return 0


def _times(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], *, rounds: int
) -> dict[str, float]:
    """Median seconds of each form."""
    forms: dict[str, Form] = {
        "one_pass": activate,
        "torch": activate_by_torch,
        "compiled": _compiled(activate_by_torch),
    }
    rows, width = shape
    inner = width * (2 if kind == "swiglu" else 1)
    sizes = ((rows, inner), (inner,))
    hidden, bias = (torch.randn(size).to(dtype).requires_grad_() for size in sizes)
    grad = torch.randn(shape).to(dtype)
    return _medians(
        {n: lambda f=form: f(hidden, bias, kind).backward(grad) for n, form in forms.items()},
        [hidden, bias],
        rounds,
    )


def _norm_times(
    rate: float, dtype: torch.dtype, shape: tuple[int, int], *, rounds: int
) -> dict[str, float]:
    """Median seconds of each form; the sum goes on as the residual, and its norm into products."""

    def added(
        output: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = residual + F.dropout(output + bias, rate, training=True)
        return total, F.layer_norm(total, shape[1:], weight, shift)

    inputs = [
        torch.randn(size).to(dtype).requires_grad_()
        for size in (shape, shape[1:], shape, shape[1:], shape[1:])
    ]
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    forms = {"torch": added, "compiled": _compiled(added)}
    return _medians(
        {n: lambda f=f: torch.autograd.backward(f(*inputs), grads) for n, f in forms.items()},
        inputs,
        rounds,
    )


def _compiled(form: Callable[..., T]) -> Callable[..., T]:
    torch.compiler.reset()  # or the number of shapes compiled for would meet its limit
    return torch.compile(form, dynamic=False)


def _medians(
    passes: dict[str, Callable[[], None]], inputs: Sequence[Tensor], rounds: int
) -> dict[str, float]:
    """Seconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(2 + rounds):
        for name, both in passes.items():
            for tensor in inputs:
                tensor.grad = None
            started = time.process_time()
            both()
            if number > 1:  # the first ones compile and warm up
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    raise SystemExit(main())
