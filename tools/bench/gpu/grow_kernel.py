#!/usr/bin/env python3
"""Writing a candidate's masters, moments and bf16 weights in one pass, against a plain copy.

python tools/bench/gpu/grow_kernel.py [--rounds 9] [--parameters N] [--device cpu|cuda]
                                      [--json FILE]

A state of 12 layers becomes one of 16.  Its new layers are copies of others, or have drawn weights,
an exp_avg of zero and the exp_avg_sq of others.  The plain copy moves the same number of bytes in
one call.  On a CPU the pass is the reference in torch.  On a GPU the share is that of the Triton
kernel alone, and ``ms`` includes the table of runs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch
from torch import Tensor

from lag_megatron.kernels.common.runs import WriteRun
from lag_megatron.kernels.grow import make_launch, write_runs
from tools.bench.common.figures import write_figures
from tools.bench.common.timing import copy_rate, device_prefix, medians

OLD, NEW, INDEX, BLOCK = 12, 16, 4, 4
STATES = ("fp32", "exp_avg", "exp_avg_sq")
PARAMETERS = {"cpu": 4 << 20, "cuda": 110 << 20}  # of the old layers together


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parameters", type=int, metavar="N", help="of the old layers together")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    found = shares(device, options.parameters or PARAMETERS[device.type], rounds=options.rounds)
    figures = {f"{device.type}_grow_{name}": value for name, value in found.items()}
    if device.type == "cuda":
        prefix = device_prefix(torch.cuda.get_device_name())
        figures = {f"{prefix}_grow_{name}": value for name, value in found.items()}
    for name, value in figures.items():
        print(f"{name:<36} {value:10.4f}")
    if options.json:
        write_figures(options.json, figures)
    return 0


def shares(device: torch.device, parameters: int, *, rounds: int) -> dict[str, float]:
    """Rate of the pass over that of a plain copy: of copied layers, of drawn layers, the lower."""
    layer = parameters // OLD // 64 * 64  # matrices are even, and so every layer of them aligned
    old = {state: torch.randn(OLD * layer, device=device) for state in STATES}
    new = {state: torch.empty(NEW * layer, device=device) for state in STATES}
    weights = torch.empty(NEW * layer, dtype=torch.bfloat16, device=device)
    sides: dict[str, list[WriteRun]] = {
        "copied": runs_of(old, new, weights, layer, drawn=False),
        "drawn": runs_of(old, new, weights, layer, drawn=True),
    }
    works: dict[str, Callable[[], object]] = {
        name: lambda runs=runs: write_runs(runs)
        for name, runs in sides.items()  # type: ignore[misc]
    }
    seconds = launched = medians(works, device, rounds=rounds, ahead=False)
    if device.type == "cuda":
        launches = {name: make_launch(runs) for name, runs in sides.items()}
        launched = medians(launches, device, rounds=rounds)
    ceiling = copy_rate(device, elements=NEW * layer, rounds=rounds)
    found = {
        f"bandwidth_share_{name}": sum(run.bytes_moved for run in runs) / launched[name] / ceiling
        for name, runs in sides.items()
    }
    return {
        "bandwidth_share": min(found.values()),
        **found,
        **{f"ms_{name}": 1e3 * value for name, value in seconds.items()},
    }


def runs_of(
    old: dict[str, Tensor], new: dict[str, Tensor], weights: Tensor, layer: int, *, drawn: bool
) -> list[WriteRun]:
    """The runs that write a candidate, layer by layer."""
    origins = [*range(INDEX + BLOCK), *range(INDEX, OLD)]
    runs = []
    for place, origin in enumerate(origins):
        here = slice(place * layer, (place + 1) * layer)
        for state in STATES:
            target, source = new[state][here], old[state][origin * layer : (origin + 1) * layer]
            follows = weights[here] if state == "fp32" else None
            is_new = INDEX + BLOCK <= place < INDEX + 2 * BLOCK
            if drawn and is_new and state == "fp32":
                runs.append(WriteRun(target, target, 1.0, follows))
            elif drawn and is_new and state == "exp_avg":
                runs.append(WriteRun(target, None, 0.0))
            else:
                runs.append(WriteRun(target, source, 1.0, follows))
    return runs


if __name__ == "__main__":
    raise SystemExit(main())
