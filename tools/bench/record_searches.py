#!/usr/bin/env python3
"""Record exhaustive searches, on whose curves rules are compared (probes.py replays them).

Each is a run of launch/train.py on one rank: a small model pretrained on the running Python's
own standard library, grown by 16 or 20 candidates that are all trained to the end of the stage.
Seeds, shapes, depths, learning rates and the length of the pretraining differ.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lag_megatron.report import write_search  # noqa: E402

FOLDER = Path(__file__).parent / "searches"
LLAMA = (
    "model.positions=rope", "model.norm=rmsnorm", "model.bias=false", "model.activation=swiglu",
    "model.tied_embeddings=false", "model.num_query_groups=1", "model.ffn_hidden_size=96",
)  # fmt: skip
SLOW = ("optimizer.lr=2.0e-3",)
SHORT = ("stages=[{steps: 150}, {steps: 400, num_layers: 7}]",)
DEEP = ("model.num_layers=6", "stages=[{steps: 300}, {steps: 400, num_layers: 8}]")
# The number at a name's end is the seed of the weights, of the growth and of the text's order.
SEARCHES: dict[str, tuple[str, ...]] = {
    "gpt-1": (),
    "llama-2": LLAMA,
    "gpt-3": (),
    "llama-4": LLAMA,
    "gpt-slow-5": SLOW,
    "llama-short-6": (*LLAMA, *SHORT),
    "gpt-deep-7": DEEP,
    "gpt-short-8": SHORT,
    "llama-slow-9": (*LLAMA, *SLOW),
    "gpt-10": (),
    "llama-11": LLAMA,
    "gpt-12": (),
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
