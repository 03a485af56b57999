#!/usr/bin/env python3
"""Kernels against what the device can do: shares of its copy bandwidth and of its matmul rate.

python tools/bench/gpu/gpu_kernels.py [--rounds 20] [--json FILE]

Needs a GPU.  Both ceilings are measured in the same call: a copy of fp32, and a product of 8192^3
in bf16.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch
import torch.nn.functional as F
from torch import Tensor

from lag_megatron.distributed.world import start_world, stop_world
from lag_megatron.kernels.adamw import adamw_on_gpu, adamw_step
from lag_megatron.kernels.common.build import nvcc_path
from lag_megatron.kernels.common.partition import Partition, Rates
from lag_megatron.model.linear_cross_entropy import linear_cross_entropy
from tools.bench.common.figures import write_figures
from tools.bench.common.timing import copy_rate, device_prefix, matmul_rate, medians
from tools.bench.gpu import grow_kernel


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        parameters: of the optimizer's partition, and of the layers that grow.
        product: side of the square product.
        tokens: of the loss; so are ``width`` and ``vocabulary``.
        heads: (batch, heads, sequence, head size) of attention, by name.
    """

    parameters: int = 128 << 20
    product: int = 8192
    tokens: int = 8192
    width: int = 2048
    vocabulary: int = 256_000
    heads: tuple[tuple[str, tuple[int, int, int, int]], ...] = (
        ("bert16", (64, 12, 512, 64)),
        ("decoder1b", (8, 16, 1280, 128)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is here: nothing to measure.")
        return 2
    start_world(tensor=1)
    prefix = device_prefix(torch.cuda.get_device_name())
    figures: dict[str, float] = {}
    for found in roofline(torch.device("cuda"), Sizes(), rounds=options.rounds):
        for name, value in found.items():
            print(f"{prefix}_{name:<44} {value:12.4f}", flush=True)
            figures[f"{prefix}_{name}"] = value
        if options.json:  # what is known stays, should a later one fail
            write_figures(options.json, figures)
    stop_world()
    return 0


def roofline(device: torch.device, sizes: Sizes, *, rounds: int) -> Iterator[dict[str, float]]:
    """Figures by name as they are measured; those that need other compilers come last."""
    bandwidth = copy_rate(device, elements=sizes.parameters, rounds=rounds)
    products = matmul_rate(device, size=sizes.product, rounds=rounds)
    yield {"copy_gb_s": bandwidth / 1e9, "matmul_tflop_s": products / 1e12}
    yield _optimizer(device, sizes.parameters, bandwidth, rounds=rounds)
    grown = grow_kernel.shares(device, sizes.parameters, rounds=rounds)
    yield {f"grow_{name}": value for name, value in grown.items()}
    yield _attention(device, sizes, products, rounds=rounds)
    yield _loss(device, sizes, products, rounds=rounds)
    if device.type == "cuda" and nvcc_path() is not None:
        yield _optimizer(device, sizes.parameters, bandwidth, rounds=rounds, by="cuda")


def _optimizer(
    device: torch.device, count: int, bandwidth: float, *, rounds: int, by: str = ""
) -> dict[str, float]:
    """AdamW on fp32 masters with bf16 gradients and weights: 28 bytes for each parameter.

    ``by`` names a kernel; the default is the one that training takes.
    """
    master, exp_avg, exp_avg_sq = (torch.rand(count, device=device) for _ in range(3))
    partition = Partition(
        master=master,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        step=torch.ones((), device=device),
        weights=master.bfloat16(),
        gradients=[torch.randn(count, device=device).bfloat16()],
    )
    rates, scale = Rates(1e-3, (0.9, 0.95), 1e-8, 0.1), torch.ones((), device=device)
    step = functools.partial(adamw_on_gpu, by=by) if by else adamw_step
    taken = medians({"": lambda: step(partition, rates, scale)}, device, rounds=rounds)[""]
    moved = count * (2 * 12 + 2 + 2)
    return {f"optimizer_bandwidth_share{by and f'_{by}'}": moved / taken / bandwidth}


def _loss(device: torch.device, sizes: Sizes, products: float, *, rounds: int) -> dict[str, float]:
    """Output layer and loss, forward and backward, in chunks and by Megatron-Core's fused loss."""
    hidden = torch.randn(sizes.tokens, sizes.width, device=device).bfloat16().requires_grad_()
    weight = torch.randn(sizes.vocabulary, sizes.width, device=device) / sizes.width**0.5
    weight = weight.bfloat16().requires_grad_()
    labels = torch.randint(sizes.vocabulary, (sizes.tokens,), device=device)
    mask = torch.ones(sizes.tokens, device=device)

    def chunked() -> Tensor:
        loss = linear_cross_entropy(hidden, weight, None, labels, mask)
        loss.backward()
        return loss.detach()

    def megatron() -> Tensor:
        loss = megatron_loss(F.linear(hidden, weight)[:, None], labels[:, None]).sum()
        loss.backward()
        return loss.detach()

    def clear() -> None:
        hidden.grad = weight.grad = None

    ours, theirs = float(chunked()), float(megatron())
    if abs(ours - theirs) > 1e-2 * abs(theirs):
        raise SystemExit(f"the two losses differ: {ours} and {theirs}")
    seconds = medians(
        {"chunked": chunked, "megatron": megatron}, device, rounds=rounds, before=clear
    )
    work = 6 * sizes.tokens * sizes.width * sizes.vocabulary
    return {
        "ce_vs_megatron": seconds["megatron"] / seconds["chunked"],
        "ce_matmul_share": work / seconds["chunked"] / products,
    }


def megatron_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Megatron-Core's fused vocab-parallel cross-entropy, of a vocabulary on one rank."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    found: Tensor = fused_vocab_parallel_cross_entropy(
        logits, labels, get_tensor_model_parallel_group()
    )
    return found


def _attention(
    device: torch.device, sizes: Sizes, products: float, *, rounds: int
) -> dict[str, float]:
    """Torch's scaled dot product, forward and backward; half the scores where it is causal."""
    figures = {}
    for name, shape in sizes.heads:
        heads_of = [torch.randn(shape, device=device).bfloat16() for _ in range(3)]
        batch, heads, length, size = shape
        for causal in (False, True):
            attend = functools.partial(_attend, [t.requires_grad_() for t in heads_of], causal)
            seconds = medians({"": attend}, device, rounds=rounds)[""]
            work = 12 * batch * heads * length**2 * size / (2 if causal else 1)
            kind = "causal" if causal else "full"
            figures[f"attention_matmul_share_{name}_{kind}"] = work / seconds / products
    return figures


def _attend(qkv: list[Tensor], causal: bool) -> None:
    found = F.scaled_dot_product_attention(*qkv, is_causal=causal)
    torch.autograd.grad(found, qkv, qkv[0].detach())


if __name__ == "__main__":
    raise SystemExit(main())
