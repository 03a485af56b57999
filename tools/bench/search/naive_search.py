"""A whole search under one launch against a launch for each candidate."""

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lag_megatron.config import load_config
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.pool import Candidate, build_pool
from lag_megatron.planning.cost import parameter_count
from tools.bench.search.launched import Base, Searched, launch, make_base, run_search

RANKS = 2
# Groups add up gradients in another order than two ranks do.
SAME_LOSS = 5e-3
TOKENIZER = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is searched: a GPT with ``target`` layers and batches of ``rows`` times ``length``.

    The defaults have 12.9 million parameters, 12 candidates and a lag of 100 steps.  Batches are
    tiny, so that |G| * k steps of a naive search take minutes.
    """

    hidden: int = 256
    source: int = 12
    target: int = 16
    rows: int = 4
    length: int = 16
    lag: int = 100
    indices: tuple[int, ...] = (0, 4, 8)
    blocks: tuple[int, ...] = (2, 4)


SMOKE = Sizes(hidden=32, source=3, target=4, lag=5, indices=(0, 1, 2), blocks=(1,))


def search_figures(scratch: Path, sizes: Sizes, *, naive: int) -> dict[str, float]:
    """Figures of a search and of the naive loop, of which ``naive`` candidates are measured.

    The base is trained beforehand and counts on neither side.
    """
    base = make_base(scratch / "search", _tree(sizes), ranks=RANKS)
    pool = _pool(base)
    searched = run_search(base, "searched", {}, ranks=RANKS)
    decision = searched.decision
    chosen = next(i for i, c in enumerate(pool) if c.id == decision["chosen"])
    losses: dict[str, float] = {}
    seconds: list[float] = []
    for index in _spread_indices(len(pool), naive, first=chosen):
        spent, losses[pool[index].id] = _naive_probe(base, pool[index])
        seconds.append(spent)
        print(f"naive: {pool[index].id} took {spent:.1f} s", flush=True)
    _require_same_loss(decision, losses)
    figures = _figures(searched, seconds, len(pool))
    _print(base, sizes, figures, searched, seconds)
    shutil.rmtree(base.folder)
    return figures


def _tree(sizes: Sizes) -> dict[str, Any]:
    """The whole configuration; everything about the rule is left at its default."""
    pool = {"operator": "lag", "index": list(sizes.indices), "block_size": list(sizes.blocks)}
    return {
        "model": {
            "num_layers": sizes.source,
            "hidden_size": sizes.hidden,
            "ffn_hidden_size": 4 * sizes.hidden,
            "num_attention_heads": 4,
            "num_query_groups": 4,
            "seq_length": sizes.length,
        },
        "data": {
            "source": "stdlib",
            "tokenizer": {"type": "bpe", "vocab_size": TOKENIZER},
            "validation_tokens": 8 * sizes.rows * sizes.length,
        },
        "optimizer": {"lr": 3e-4, "schedule": {"warmup_steps": 10}},
        "parallel": {"micro_batch": sizes.rows // RANKS, "global_batch": sizes.rows},
        "stages": [{"steps": 20}, {"steps": sizes.lag, "num_layers": sizes.target}],
        "growth": {"pool": pool, "lag": sizes.lag, "probe_groups": "auto"},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def _pool(base: Base) -> tuple[Candidate, ...]:
    config = load_config(base.config("pool", {}))
    return build_pool(
        config.growth_before(1),
        source_layers=config.layers_of(0),
        target_layers=config.layers_of(1),
        seed=config.seed,
        init_std=config.model.init_std,
    )


def _spread_indices(count: int, wanted: int, *, first: int) -> list[int]:
    """Indices over the whole pool, the winner's first."""
    even = [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]
    return list(dict.fromkeys([first, *even]))[: max(wanted, 1)]


def _naive_probe(base: Base, candidate: Candidate) -> tuple[float, float]:
    """Seconds from growing to the validation loss, and that loss."""
    folder = base.folder / f"naive-{candidate.id}"
    folder.mkdir()
    config = base.config("naive", {})
    grown = folder / base.checkpoint.name
    started = time.perf_counter()
    grow_checkpoint(base.checkpoint, grown, candidate.plan, workers=RANKS)
    arguments = ["--config", str(config), "--checkpoint", str(grown), "--folder", str(folder)]
    launch(Path(__file__).with_name("naive_probe.py"), arguments, ranks=RANKS)
    spent = time.perf_counter() - started
    loss = json.loads((folder / "loss.json").read_text())["val_loss"]
    shutil.rmtree(folder)
    return spent, loss


def _require_same_loss(decision: dict[str, Any], losses: dict[str, float]) -> None:
    """Both sides must have done the same work."""
    ends = {c["id"]: dict(c["curve"]).get(decision["lag"]) for c in decision["candidates"]}
    found = {id_: ends[id_] for id_ in losses if ends[id_] is not None}
    assert decision["chosen"] in found, "the winner must be among those measured"
    for id_, loss in found.items():
        difference = abs(loss - losses[id_])
        print(f"same work: {id_} ends at {loss:.6f}, naively at {losses[id_]:.6f}")
        if difference > SAME_LOSS:
            raise RuntimeError(f"{id_}: the two sides differ by {difference} nats")


def _figures(searched: Searched, seconds: Sequence[float], candidates: int) -> dict[str, float]:
    cost = searched.decision["cost"]
    whole, naive = searched.ended - searched.started, statistics.fmean(seconds) * candidates
    return {
        "search_speedup": naive / whole,
        "search_speedup_to_decision": naive / searched.decided,
        "search_seconds": whole,
        "search_seconds_to_decision": searched.decided,
        "search_seconds_probing": searched.probing,
        "naive_seconds": naive,
        "naive_seconds_a_candidate": statistics.fmean(seconds),
        "search_step_ratio": cost["probe_steps"] / cost["exhaustive_steps"],
        "coordinator_share": searched.coordinator_share,
        "coordinator_seconds": cost["coordinator_seconds"],
    }


def _print(
    base: Base,
    sizes: Sizes,
    figures: dict[str, float],
    searched: Searched,
    seconds: Sequence[float],
) -> None:
    decision = searched.decision
    config = load_config(base.config("print", {}))
    count = parameter_count(config.model, num_layers=sizes.target, vocab_size=TOKENIZER)
    pool = len(decision["candidates"])
    groups = searched.steps_of_groups(tokens=sizes.rows * sizes.length)
    step = statistics.median(value for found in groups.values() for value in found)
    print(f"{count / 1e6:.1f} M parameters, {pool} candidates, k = {sizes.lag}, {RANKS} ranks")
    print(
        f"search: {len(groups)} probe groups, rungs {[r['rung'] for r in decision['rungs']]}, "
        f"{decision['cost']['probe_steps']} steps of {decision['cost']['exhaustive_steps']}, "
        f"{step * 1e3:.0f} ms a step in a group; {figures['search_seconds']:.1f} s from launch to "
        f"exit, report and all, {figures['search_seconds_to_decision']:.1f} s to the decision"
    )
    measured = ", ".join(f"{value:.1f}" for value in seconds)
    scaled = f", scaled from {len(seconds)} to {pool}" if len(seconds) < pool else ""
    print(
        f"naive loop: {figures['naive_seconds']:.1f} s{scaled}; a candidate took {measured} s "
        f"(spread {(max(seconds) - min(seconds)) / statistics.fmean(seconds):.0%})"
    )
