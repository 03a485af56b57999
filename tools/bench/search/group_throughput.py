"""Probe groups of one rank each against one group of all ranks, on the same candidates."""

import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from tools.bench.search.launched import make_base, run_search

RANKS = 4
ROUNDS = 3
ROWS, LENGTH = 32, 128


def group_figures(scratch: Path, *, smoke: bool = False) -> dict[str, float]:
    """Tokens per second of the probes' training: medians over rounds, both ways in turns."""
    rounds = 1 if smoke else ROUNDS
    tokens = ROWS * LENGTH
    base = make_base(scratch / "groups", tree_of(lag=2 if smoke else 12), ranks=RANKS)
    rates: dict[int, list[float]] = {1: [], RANKS: []}
    walls: dict[int, list[float]] = {1: [], RANKS: []}
    shares: list[float] = []
    for number in range(rounds):
        for groups in rates:
            name = f"groups{groups}-{number}"
            searched = run_search(base, name, {"probe_groups": groups}, ranks=RANKS)
            steps = searched.steps_of_groups(tokens=tokens)
            assert len(steps) == groups, f"{groups} groups, of which {len(steps)} worked"
            count = sum(map(len, steps.values()))
            # An engine's first step sets up memory and kernels; each group has one.
            warm = [seconds[1:] for seconds in steps.values()]
            # Groups train side by side: what counts is when the last one is done.
            rates[groups].append(tokens * sum(map(len, warm)) / max(map(sum, warm)))
            walls[groups].append(tokens * count / searched.probing)
            shares.append(searched.coordinator_share)
            searched.remove()
    shutil.rmtree(base.folder)
    figures = {
        "groups_throughput_ratio": _ratio(rates),
        "groups_search_ratio": _ratio(walls),
        "groups_tokens_per_second": statistics.median(rates[RANKS]),
        "one_group_tokens_per_second": statistics.median(rates[1]),
        "groups_coordinator_share": max(shares),
    }
    _print(figures, rates, rounds)
    return figures


def tree_of(*, lag: int) -> dict[str, Any]:
    """A GPT of 0.1 million parameters and 4 candidates; all train to the lag.

    It is this small because groups pay off where a rank's part of the batch takes little longer
    than its communication.  On GPUs that is so where a batch is spread over many of them.
    """
    pool = {"operator": "lag", "index": [0, 2], "block_size": [2]}
    return {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 128,
            "num_attention_heads": 2,
            "num_query_groups": 2,
            "seq_length": LENGTH,
        },
        "data": {
            "source": "stdlib",
            "tokenizer": {"type": "bpe", "vocab_size": 512},
            "validation_tokens": ROWS * LENGTH,
        },
        "parallel": {"micro_batch": ROWS // RANKS, "global_batch": ROWS},
        "stages": [{"steps": 4}, {"steps": lag, "num_layers": 6}],
        "growth": {"pool": pool, "rule": "lag", "lag": lag},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def _ratio(rates: dict[int, list[float]]) -> float:
    return statistics.median(rates[RANKS]) / statistics.median(rates[1])


def _print(figures: dict[str, float], rates: dict[int, list[float]], rounds: int) -> None:
    cores = os.cpu_count() or 1
    print(f"{RANKS} ranks on {cores} cores, batches of {ROWS} x {LENGTH} tokens, {rounds} rounds")
    if cores < RANKS:
        print("ranks share cores: waiting for each other costs more than it would on their own")
    for groups, found in rates.items():
        row = "  ".join(f"{rate:8.0f}" for rate in found)
        print(f"{groups} groups of {RANKS // groups}: {row} tokens/s in training")
    print(
        f"whole probing, with switches, evaluations, saving: {figures['groups_search_ratio']:.2f}"
    )
