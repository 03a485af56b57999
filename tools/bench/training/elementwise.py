#!/usr/bin/env python3
"""Elementwise operations in one pass, by torch's operations, and compiled by torch.

python tools/bench/training/elementwise.py [--device cpu|cuda] [--rounds 9] [--json FILE]

Medians of rounds in turns, forward and backward, on a CPU process time of one thread.  Of an
activation with its bias a figure is how much faster one pass is than the fastest of the others;
`one_pass_wins` in `lag_megatron/kernels/cpu/activation_cpu.py` says where it is taken.  Where there
is no pass of ours, which is bias, dropout, residual and the norm after them, and all on a GPU, a
figure is how much faster the compiled form is.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch
import torch.nn.functional as F
from torch import Tensor

from lag_megatron.kernels.cpu.activation_cpu import KINDS, activate, activate_by_torch
from tools.bench.common.figures import write_figures
from tools.bench.common.timing import medians

# Tokens and width of the MLP, and of the residual stream; on a GPU those of the steps measured.
SHAPES = {
    "cpu": ((256, 512), (1024, 1024), (4096, 3072)),
    "cuda": ((32768, 3072), (10240, 8192)),
}
NORMED = {"cpu": ((256, 128), (1024, 256), (4096, 768)), "cuda": ((32768, 768), (10240, 2048))}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
DROPOUT = 0.1

Form = Callable[[Tensor, Tensor, str], Tensor]
T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)  # a default one would cost a little in every call
    figures: dict[str, float] = {}

    def note(name: str, times: dict[str, float], ours: str) -> None:
        figures.update({f"{name}_{form}_ms": 1e3 * value for form, value in times.items()})
        best = min(value for form, value in times.items() if form != ours)
        figures[name] = best / times[ours]
        row = " ".join(f"{form} {1e3 * value:9.3f}" for form, value in times.items())
        print(f"{name:<48} {row} ms {figures[name]:8.2f}", flush=True)

    for dtype in DTYPES[options.device]:
        for kind in KINDS:
            for shape in SHAPES[options.device]:
                times = _times(kind, dtype, shape, device, rounds=options.rounds)
                ours = "one_pass" if "one_pass" in times else "compiled"
                note(f"{kind}_{_name(dtype, shape, device)}", times, ours)
        for rate in (0.0, DROPOUT):
            for shape in NORMED[options.device]:
                times = _norm_times(rate, dtype, shape, device, rounds=options.rounds)
                dropped = "dropout_" if rate else ""
                name = f"residual_{dropped}norm_{_name(dtype, shape, device)}"
                note(name, times, "compiled")
    if options.json:
        write_figures(options.json, figures)
    return 0


def _name(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> str:
    of_device = "" if device.type == "cpu" else f"{device.type}_"
    return f"{of_device}{str(dtype).removeprefix('torch.')}_{shape[0]}x{shape[1]}"


def _times(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device, *, rounds: int
) -> dict[str, float]:
    """Median seconds of each form."""
    forms: dict[str, Form] = {"torch": activate_by_torch, "compiled": _compiled(activate_by_torch)}
    rows, width = shape
    inner = width * (2 if kind == "swiglu" else 1)
    sizes = ((rows, inner), (inner,))
    hidden, bias = (torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes)
    if device.type == "cpu":
        forms = {"one_pass": activate, **forms}
    grad = torch.randn(shape, device=device).to(dtype)
    return _medians(
        {n: lambda f=form: f(hidden, bias, kind).backward(grad) for n, form in forms.items()},
        [hidden, bias],
        device,
        rounds=rounds,
    )


def _norm_times(
    rate: float, dtype: torch.dtype, shape: tuple[int, int], device: torch.device, *, rounds: int
) -> dict[str, float]:
    """Median seconds of each form; the sum goes on as the residual, and its norm into products."""

    def added(
        output: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = residual + F.dropout(output + bias, rate, training=True)
        return total, F.layer_norm(total, shape[1:], weight, shift)

    inputs = [
        torch.randn(size, device=device).to(dtype).requires_grad_()
        for size in (shape, shape[1:], shape, shape[1:], shape[1:])
    ]
    grads = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    forms = {"torch": added, "compiled": _compiled(added)}
    return _medians(
        {n: lambda f=f: torch.autograd.backward(f(*inputs), grads) for n, f in forms.items()},
        inputs,
        device,
        rounds=rounds,
    )


def _compiled(form: Callable[..., T]) -> Callable[..., T]:
    torch.compiler.reset()  # or the number of shapes compiled for would meet its limit
    return torch.compile(form, dynamic=False)


def _medians(
    passes: dict[str, Callable[[], None]],
    inputs: Sequence[Tensor],
    device: torch.device,
    *,
    rounds: int,
) -> dict[str, float]:
    """Seconds of each, in turns."""

    def clear() -> None:
        for tensor in inputs:
            tensor.grad = None

    return medians(passes, device, rounds=rounds, before=clear)


if __name__ == "__main__":
    raise SystemExit(main())
