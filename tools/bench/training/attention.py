#!/usr/bin/env python3
"""Core attention by plain products against torch's scaled dot product, forward and backward.

python tools/bench/training/attention.py [--rounds 7] [--json FILE]

One thread, process time, medians of rounds in turns, 4096 positions a batch in heads of 64.  A
ratio above 1 is how much faster products are; `prefers_matmul_attention` in
`lag_megatron/model/attention.py` says where they are used.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch
import torch.nn.functional as F
from torch import Tensor

from lag_megatron.model.attention import matmul_attention
from tools.bench.common.figures import write_figures

POSITIONS, HEADS, SIZE = 4096, 4, 64
LENGTHS = (64, 128, 256, 512, 1024)
KINDS = {"causal": (torch.float32, torch.bfloat16), "full": (torch.float32, torch.bfloat16)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for kind, dtypes in KINDS.items():
        for dtype in dtypes:
            for length in LENGTHS:
                name = f"{kind}_{str(dtype).removeprefix('torch.')}_{length}"
                figures[name] = _ratio(kind == "causal", dtype, length, rounds=options.rounds)
                print(f"{name:<24} {figures[name]:8.2f}", flush=True)
    if options.json:
        write_figures(options.json, figures)
    return 0


def _ratio(causal: bool, dtype: torch.dtype, length: int, *, rounds: int) -> float:
    """Time of torch's scaled dot product over that of plain products."""
    shape = (length, POSITIONS // length, HEADS, SIZE)  # as the layers have it: (s, b, h, k)
    heads = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]

    def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return matmul_attention(query, key, value, None, causal=causal, scale=SIZE**-0.5)

    def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    seconds: dict[str, list[float]] = {"products": [], "torch": []}
    for number in range(1 + rounds):
        for name, way in (("products", products), ("torch", torchs)):
            taken = _timed(way, heads)
            if number:
                seconds[name].append(taken)
    return statistics.median(seconds["torch"]) / statistics.median(seconds["products"])


def _timed(way: Callable[..., Tensor], heads: list[Tensor]) -> float:
    for tensor in heads:
        tensor.grad = None
    started = time.process_time()
    out = way(*(tensor.permute(1, 2, 0, 3) for tensor in heads))
    out.permute(2, 0, 1, 3).flatten(2).backward(
        torch.ones(1, dtype=out.dtype).expand(heads[0].shape[0], heads[0].shape[1], HEADS * SIZE)
    )
    return time.process_time() - started


if __name__ == "__main__":
    raise SystemExit(main())
