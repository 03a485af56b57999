#!/usr/bin/env python3
"""Time and memory of the output layer with its loss, against Megatron-Core's, forward and backward.

python tools/bench/training/loss_heads.py [--rounds 5] [--json FILE]

Two comparisons on one rank: the output layer with its loss in chunks against logits of the whole
batch and Megatron-Core's cross-entropy; and BERT's head at the predicted 15 % of the positions,
chunked as this project runs it, against Megatron-Core's head and loss over all of them.  Both sides
run in turns; medians.  Memory is what a process holds at its peak above what it held before and
above the gradients that it leaves, each side in processes of its own.
"""

import argparse
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from lag_megatron.config import ModelConfig, ParallelConfig
from lag_megatron.distributed.world import start_world, stop_world
from lag_megatron.model import build_model
from lag_megatron.model.linear_cross_entropy import linear_cross_entropy
from tools.bench.common.figures import write_figures

TOKENS, WIDTH, VOCABULARY = 4096, 256, 32768
BERT_SHAPE = {"hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 4,
              "num_query_groups": 4, "seq_length": 128, "family": "bert"}  # fmt: skip
BERT_VOCABULARY, BERT_BATCH = 8192, 16

Side = Callable[[], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    memory = {name: _peak_of(name) for name in ("chunked", "whole")}
    start_world(tensor=1)
    sides = _head_sides()
    times = _times(sides, rounds=options.rounds)
    bert = _times(_bert_sides(), rounds=options.rounds)
    stop_world()
    figures = {
        "chunked_ce_time_ratio": times["chunked"] / times["whole"],
        "chunked_ce_memory_ratio": memory["chunked"] / memory["whole"],
        "chunked_ce_seconds": times["chunked"],
        "whole_ce_seconds": times["whole"],
        "chunked_ce_mib": memory["chunked"] / 2**20,
        "whole_ce_mib": memory["whole"] / 2**20,
        "mlm_head_speedup": bert["all tokens"] / bert["predicted"],
    }
    for name, value in figures.items():
        print(f"{name:<26} {value:10.4f}")
    if options.json:
        write_figures(options.json, figures)
    return 0


def _head_sides() -> Mapping[str, Side]:
    """Both ways from the same hidden states to the same loss."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=draw) / WIDTH**0.5).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    mask = torch.ones(TOKENS)

    def clear() -> None:
        hidden.grad = weight.grad = None

    def chunked() -> Tensor:
        clear()
        loss = linear_cross_entropy(hidden, weight, None, labels, mask)
        loss.backward()
        return loss.detach()

    def whole() -> Tensor:
        clear()
        logits = torch.nn.functional.linear(hidden, weight)[:, None]
        loss = (vocab_parallel_cross_entropy(logits, labels[:, None])[:, 0] * mask).sum()
        loss.backward()
        return loss.detach()

    return {"chunked": chunked, "whole": whole}


def _bert_sides() -> Mapping[str, Side]:
    """BERT's head and loss on given hidden states."""
    shape = ModelConfig(num_layers=1, **BERT_SHAPE)
    model = build_model(shape, ParallelConfig(), num_layers=1, vocab_size=BERT_VOCABULARY)
    length, predicted = shape.seq_length, round(0.15 * shape.seq_length)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=draw)
    hidden = torch.randn(length, BERT_BATCH, shape.hidden_size, generator=draw).requires_grad_()
    places = torch.stack([torch.randperm(length, generator=draw) for _ in range(BERT_BATCH)])
    places = places[:, :predicted].sort().values
    labels = torch.randint(BERT_VOCABULARY, (BERT_BATCH, length), generator=draw)
    mask = torch.zeros(BERT_BATCH, length).scatter_(1, places, 1.0)
    weight = model.embedding.word_embeddings.weight

    def clear() -> None:
        hidden.grad = None
        model.zero_grad(set_to_none=True)

    def at_predicted() -> Tensor:
        clear()
        index = places.t()[..., None].expand(-1, -1, shape.hidden_size)
        head = model.lm_head(hidden.gather(0, index))
        here, ones = labels.gather(1, places), mask.gather(1, places)
        loss, _ = model.output_layer(head, weight=weight, labels=here, loss_mask=ones)
        loss.backward()
        return loss.detach()

    def all_tokens() -> Tensor:
        clear()
        logits, _ = model.output_layer(model.lm_head(hidden), weight=weight)
        loss = (model.compute_language_model_loss(labels, logits) * mask).sum()
        loss.backward()
        return loss.detach()

    return {"predicted": at_predicted, "all tokens": all_tokens}


def _times(sides: Mapping[str, Side], *, rounds: int) -> dict[str, float]:
    """Median seconds of each side, run in turns; they must find the same loss."""
    losses = [float(side()) for side in sides.values()]
    if max(losses) - min(losses) > 1e-5 * abs(losses[0]):
        raise SystemExit(f"the sides disagree on the loss: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _peak_of(name: str) -> float:
    """Bytes that one side holds at its peak, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(name, send))
    child.start()
    send.close()
    peak = receive.recv()
    child.join()
    return float(peak)


def _measure_peak(name: str, send: "multiprocessing.connection.Connection") -> None:
    start_world(tensor=1)
    side = _head_sides()[name]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _resident("VmRSS")
    side()
    kept = 4 * (TOKENS * WIDTH + VOCABULARY * WIDTH)  # the gradients
    send.send(_resident("VmHWM") - before - kept)
    stop_world()


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    raise SystemExit(main())
