#!/usr/bin/env python3
"""Growth on shards: rate, memory, bytes read, and the cost of a switch in a live engine.

python tools/bench/growth/growth.py [--json FILE] [--scratch FOLDER] [--workers N]

Both sides of each comparison run in turns in one call; medians of five rounds after one to warm up,
checksums included.  Needs 8 GiB of disk and about five minutes.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch

from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.distributed.world import World, start_world, stop_world
from lag_megatron.growth.apply.grown_state import retarget
from tools.bench.common import synthetic
from tools.bench.common.figures import write_figures
from tools.bench.growth.live_switch import switch_figures
from tools.bench.growth.offline_growth import (
    against_gathering,
    copy_ratio,
    read_ratio,
    worker_memory,
)

# Layers of 512 hidden units for each size of state, in GiB.
SIZES = {"0.5": 12, "1": 24, "2": 48}
RANKS = 4
HIDDEN, VOCABULARY = 512, 1024
BOUNDS = {
    "copy_ratio": ">= 0.7",
    "finite_check_ratio": "<= 1.05",
    "worker_anon_mb": "<= 64",
    "read_ratio": "<= 1.05",
    "gather_speedup": ">= 5",
    "gather_memory_ratio": f">= {RANKS}",
    "switch_step_ratio": "<= 0.10",
    "switch_reload_speedup": ">= 15",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="on the disk to be measured")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = start_world(tensor=1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        figures = _offline(world, Path(folder), options.workers)
        figures |= switch_figures(world, Path(folder))
    stop_world()
    for name, value in figures.items():
        print(f"{name:<28} {value:10.3f}   {BOUNDS.get(name, '')}")
    print("\ncomputed from these rates, 12 -> 16 layers' worth of growth, bf16, tensor parallel 8:")
    print("\n".join(_extrapolated(figures)))
    if options.json:
        write_figures(options.json, figures)
    return 0


def _extrapolated(figures: dict[str, float]) -> Iterator[str]:
    """What larger models would take if every rank had this machine's rates."""
    yield "| model | ranks | GB a rank | written, s | written with weights, s | in place, s |"
    yield "|---|--:|--:|--:|--:|--:|"
    write, switch = figures["grow_gb_s_2gib"], figures["switch_gb_s"]
    for name, parameters in (("7B", 7.0), ("70B", 70.0)):
        grown = parameters * 4 / 3
        for ranks in (64, 512):
            state, weights = 12 * grown / ranks, 2 * grown / 8
            yield (
                f"| {name} -> {grown:.1f}B | {ranks} | {state:.2f} | {state / write:.1f} | "
                f"{(state + weights) / write:.1f} | {state / switch:.2f} |"
            )


def _offline(world: World, scratch: Path, workers: int) -> dict[str, float]:
    seed = synthetic.seed_checkpoint(world, scratch / "seed", hidden=HIDDEN, vocabulary=VOCABULARY)
    topology = retarget(ZeroCheckpoint.open(seed).topology, world_size=RANKS, precision="bf16")
    figures: dict[str, float] = {}
    for size, layers in SIZES.items():
        folder = scratch / size
        source = synthetic.stack(seed, folder, layers=layers, topology=topology)
        plan = synthetic.duplicate_middle_third(layers)
        found = copy_ratio(source, plan, folder, workers=workers)
        found["worker_anon_mb"] = worker_memory(source, plan, folder)
        found["read_ratio"] = read_ratio(source, plan, folder)
        if size == "1":
            figures |= against_gathering(source, plan, folder, workers=workers)
        figures |= {f"{name}_{size}gib": value for name, value in found.items()}
    figures["copy_ratio"] = min(figures[f"copy_ratio_{size}gib"] for size in SIZES)
    checked = [figures[f"finite_check_ratio_{size}gib"] for size in SIZES]
    figures["finite_check_ratio"] = statistics.median(checked)
    for name in ("worker_anon_mb", "read_ratio"):
        figures[name] = max(figures[f"{name}_{size}gib"] for size in SIZES)
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
