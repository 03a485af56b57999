#!/usr/bin/env python3
"""Record exhaustive searches, on whose curves rules are compared (probes.py replays them).

Each is a run of launch/train.py on one rank: a small model pretrained on the running Python's
own standard library, grown by 16 or 18 candidates that are all trained to the end of the stage.
Seeds, shapes, depths, pools, learning rates and the length of the pretraining differ.  The lag is
four times the phase transition or more; `searches/short_lags/` holds earlier ones, of 160 and 240
steps, whose first rung lies before it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from lag_megatron.report import write_search  # noqa: E402

FOLDER = ROOT / "tools" / "bench" / "searches"
LLAMA = (
    "model.positions=rope", "model.norm=rmsnorm", "model.bias=false", "model.activation=swiglu",
    "model.tied_embeddings=false", "model.num_query_groups=1", "model.ffn_hidden_size=96",
)  # fmt: skip
LONG = ("model.seq_length=64", "parallel={micro_batch: 32, global_batch: 32, zero_stage: 1}")
SLOW = ("optimizer.lr=2.5e-3",)
YOUNG = ("stages.0.steps=500", "optimizer.schedule.stable_steps=940")
PLACES = ("model.num_layers=3", "stages.1.num_layers=5", "growth.pool.scale=[1.0, 0.3]")
ONE = ("model.num_layers=3", "growth.pool.scale=[1.0, 0.5, 0.2]")
# The number at a name's end is the seed of the weights, of the growth and of the text's order.
SEARCHES: dict[str, tuple[str, ...]] = {
    "gpt-3": (),
    "llama-8": LLAMA,
    "gpt-places-1": PLACES,
    "llama-one-2": (*LLAMA, *ONE),
    "gpt-long-5": LONG,
    "llama-young-6": (*LLAMA, *YOUNG),
    "gpt-one-7": ONE,
    "llama-places-4": (*LLAMA, *PLACES),
    "gpt-slow-9": SLOW,
    "llama-long-10": (*LLAMA, *LONG),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--run-dirs", type=Path, help="where runs are kept, and gone on with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run_dirs or Path(scratch)
        with ThreadPoolExecutor(options.workers) as pool:
            codes = list(pool.map(lambda name: record(name, folder), options.only))
    return max(codes)


def record(name: str, folder: Path) -> int:
    """Make or finish one run and keep its search; the program's exit code."""
    run_dir = folder / name
    seed = name.rpartition("-")[2]
    overrides = [f"seed={seed}", f"data.seed={seed}", *SEARCHES[name]]
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--run-dir", str(run_dir)]
    command += ["--config", str(FOLDER / "base.yaml")]
    command += [part for override in overrides for part in ("--set", override)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
        return done.returncode
    write_search(run_dir, 1, FOLDER / f"{name}.json.gz")
    print(f"{name}: recorded", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
