#!/usr/bin/env python3
"""Loss curves of one configuration under every ZeRO stage and tensor-parallel size, side by side.

python tools/bench/training/topologies.py [--config configs/demo.yaml] [--steps 20] [--json FILE]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from tools.bench.common.figures import write_figures

ROOT = Path(__file__).resolve().parents[3]
TOPOLOGIES = ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2))
SHOWN = 10


def main() -> int:
    options = _parser().parse_args()
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for zero_stage, tensor in TOPOLOGIES:
            name = f"zero{zero_stage}_tp{tensor}"
            print(f"running {name} on {options.ranks} ranks", file=sys.stderr, flush=True)
            curves[name] = _losses(Path(folder) / name, zero_stage, tensor, options)
    _print_table(curves)
    reference = next(iter(curves.values()))
    worst = {
        name: max(abs(a - b) for a, b in zip(curve, reference, strict=True))
        for name, curve in curves.items()
    }
    print("largest difference from the first column, in nats a token:")
    print("  " + "  ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    if options.json:
        figures = {f"{name}_max_abs_difference": value for name, value in worst.items()}
        figures |= {f"{name}_last_loss": curve[-1] for name, curve in curves.items()}
        write_figures(options.json, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo.yaml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _losses(
    run_dir: Path, zero_stage: int, tensor: int, options: argparse.Namespace
) -> list[float]:
    overrides = (
        f"parallel.zero_stage={zero_stage}",
        f"parallel.tensor={tensor}",
        f"stages=[{{steps: {options.steps}}}]",
        "tracking.wandb.mode=disabled",
    )
    port = str(random.SystemRandom().randrange(20_000, 32_000))
    subprocess.run(
        [
            str(Path(sys.executable).parent / "deepspeed"),
            *("--num_gpus", str(options.ranks), "--master_port", port),
            *(str(ROOT / "launch" / "train.py"), "--config", options.config),
            *("--run-dir", str(run_dir)),
            *(word for override in overrides for word in ("--set", override)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def _print_table(curves: dict[str, list[float]]) -> None:
    print("step  " + "  ".join(f"{name:>10}" for name in curves))
    steps = len(next(iter(curves.values())))
    for step in range(0, steps, max(1, steps // SHOWN)):
        print(f"{step + 1:>4}  " + "  ".join(f"{curve[step]:10.6f}" for curve in curves.values()))


if __name__ == "__main__":
    sys.exit(main())
