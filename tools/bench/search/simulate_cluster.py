#!/usr/bin/env python3
"""What one search costs on 8 to 1024 GPUs, for each number of probe groups.

python tools/bench/search/simulate_cluster.py [--config FILE] [--curves FILE] [--gpus N ...]
                                              [--json FILE]
python tools/bench/search/simulate_cluster.py --measure [--keep-curves FILE] [--json FILE]

Without --curves the numbers are computed for an H200, not measured.  --measure takes the curves of
1, 2 and 4 ranks on this machine and compares what they predict with searches run here.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lag_megatron.config import GrowthConfig, RunConfig, load_config
from lag_megatron.errors import ConfigError, LagError
from lag_megatron.planning.cost import parameter_count, training_flops_per_token
from lag_megatron.planning.vocab_size import estimate_vocab_size
from tools.bench.common.figures import write_figures
from tools.bench.search.cluster_job import job_of
from tools.bench.search.cluster_measure import measure
from tools.bench.search.cluster_model import (
    GB,
    Cost,
    Link,
    Machine,
    SearchJob,
    group_counts,
    read_machine,
    search_cost,
    write_machine,
)

ROOT = Path(__file__).resolve().parents[3]
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Assumptions for one H200 with eight to a host; nothing of this was measured here.
H200_FLOPS = 490e12  # 62 % of the 790 TFLOP/s that an 8192-cubed bf16 product reaches
H200_LAUNCHES = 7e-3  # 1000 to 1500 kernel launches a pass, without CUDA graphs
H200_MEMORY = 141 * GB
H200_COPIES = 4.3e12  # bytes a second, read and written, of a copy on the device
ADAM_BYTES = 60  # a parameter, read and written by DeepSpeed's step
H200 = (
    "H200, computed, not measured: 490 TFLOP/s (62 % of a measured bf16 product), 7 ms of kernel "
    "launches a pass, 480 GB/s NVLink all-reduce bus (NVLS, nccl-tests #212), 400 Gb/s a GPU "
    "between hosts, 10 GB/s a rank from and 2 GB/s to a file system of 100 GB/s, 60 s to start"
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        figures = _measured(options) if options.measure else _simulated(options)
    except LagError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        write_figures(options.json, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT / "configs" / "gpt2_small_lag.yaml"
    parser.add_argument("--config", type=Path, default=default, help="a run that grows")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override")
    parser.add_argument("--growth", type=int, default=1, metavar="N", help="which growth event")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, metavar="N")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="of a machine, for this model")
    parser.add_argument("--measure", action="store_true", help="this machine, and check the model")
    parser.add_argument("--keep-curves", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER")
    parser.add_argument("--all", action="store_true", help="print every number of groups")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


# Computing


def _simulated(options: argparse.Namespace) -> dict[str, float]:
    config = load_config(options.config, overrides=options.set)
    if config.parallel.tensor > 1:
        raise ConfigError(
            f"parallel.tensor: {config.parallel.tensor} is not modelled; give --set "
            "parallel.tensor=1."
        )
    machine = read_machine(options.curves) if options.curves else h200(config, options.growth)
    print(machine.source)
    figures: dict[str, float] = {}
    settings = config.growth_before(options.growth)
    for growth in (settings, _other_rule(settings)):
        job = job_of(config, options.growth, growth)
        plan = ", ".join(f"{count} to {rung}" for rung, count, _ in job.rungs)
        print(
            f"\n{options.config.name}, {job.parameters / 1e6:.0f} M parameters, {job.rows} x "
            f"{job.length} tokens a step; rule {growth.rule}: {plan} ({job.train_steps:,} steps)"
        )
        _print_costs(machine, job, options, growth.rule, figures)
    return figures


def _other_rule(growth: GrowthConfig) -> GrowthConfig:
    """The other rule with the same lag, halving as by default."""
    return replace(growth, rule="lag" if growth.rule == "halving" else "halving", rungs=())


def h200(config: RunConfig, number: int) -> Machine:
    """The assumed GPU with this model on it."""
    vocab_size, _ = estimate_vocab_size(config)
    shape = {"num_layers": config.layers_of(number), "vocab_size": vocab_size}
    flops = training_flops_per_token(config, **shape)
    floor = H200_LAUNCHES * H200_FLOPS / flops
    return Machine(
        source=H200,
        computed=True,
        compute=((floor, H200_LAUNCHES), (2 * floor, 2 * H200_LAUNCHES)),
        optimizer_seconds=parameter_count(config.model, **shape) * ADAM_BYTES / H200_COPIES,
        inside=Link(latency=50e-6, bytes_per_second=480 * GB),
        between=Link(latency=100e-6, bytes_per_second=50 * GB),
        ranks_per_host=8,
        memory=H200_MEMORY,
        state_rate=10 * GB,
        save_rate=2 * GB,
        disk_rate=100 * GB,
        start_seconds=60.0,
        turn_seconds=0.01,
    )


def _print_costs(
    machine: Machine,
    job: SearchJob,
    options: argparse.Namespace,
    rule: str,
    figures: dict[str, float],
) -> None:
    print("  GPUs groups x ranks   step ms   comm.  probing s    idle  speed-up over fewest groups")
    for gpus in options.gpus:
        costs = [search_cost(machine, job, ranks=gpus, groups=g) for g in group_counts(job, gpus)]
        if not costs:
            print(f"{gpus:>6} no even cut of the batch of {job.rows}")
            continue
        feasible = [cost for cost in costs if cost.fits]
        best = min(feasible, key=lambda cost: cost.wall, default=None)
        for cost in costs if options.all else [costs[0], best]:
            if cost is not None and (options.all or cost is best or cost is costs[0]):
                print(f"{gpus:>6} {_row(cost, costs[0])}{' <- best' if cost is best else ''}")
        if best is not None:
            figures[f"{rule}_{gpus}_gpus_groups"] = best.groups
            figures[f"{rule}_{gpus}_gpus_seconds"] = best.wall
            figures[f"{rule}_{gpus}_gpus_speedup"] = speedup(costs[0], best)
    print("probing: without the start; comm.: share of a step; idle: groups that wait for a rung")
    if max(options.gpus) > job.rows:
        print(f"a run starts on more than {job.rows} GPUs only with a larger global batch")


def speedup(one: Cost, other: Cost) -> float:
    """Of the probing; what it takes to start is the same."""
    return (one.wall - one.start) / (other.wall - other.start)


def _row(cost: Cost, one: Cost) -> str:
    exposed = cost.communication / cost.training if cost.training else 0.0
    return (
        f"{cost.groups:>6} x {cost.ranks:<5} {cost.step * 1e3:>9.1f} {exposed:>7.0%} "
        f"{cost.wall - cost.start:>10.1f} {cost.idle:>7.0%}  {speedup(one, cost):>6.2f}"
        f"{'' if cost.fits else '  does not fit'}"
    )


# Measuring


def _measured(options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        machine, checks = measure(Path(folder))
    if options.keep_curves:
        write_machine(machine, options.keep_curves)
    print(machine.source)
    _print_curves(machine)
    print("\nranks groups   step ms predicted  ratio   search s predicted  ratio")
    figures: dict[str, float] = {}
    for check in checks:
        print(check)
        figures |= check.figures
    figures["worst_step_error"] = _worst(check.step_ratio for check in checks)
    figures["worst_search_error"] = _worst(check.search_ratio for check in checks)
    for name in ("worst_step_error", "worst_search_error"):
        print(f"{name} {figures[name]:.2f} (the factor by which a prediction is off at most)")
    return figures


def _worst(ratios: Iterable[float]) -> float:
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def _print_curves(machine: Machine) -> None:
    points = ", ".join(f"{t:.0f}: {s * 1e3:.1f}" for t, s in machine.compute)
    print(f"tokens of a micro-batch: ms forward and backward: {points}")
    slower = ", ".join(f"{n:.0f}: {s:.2f}" for n, s in machine.contention)
    print(f"busy ranks: times slower: {slower}")
    print(
        f"optimizer {machine.optimizer_seconds * 1e3:.1f} ms; all-reduce "
        f"{machine.inside.latency * 1e3:.2f} ms + bytes at "
        f"{machine.inside.bytes_per_second / GB:.2f} GB/s; a state taken over at "
        f"{machine.state_rate / GB:.2f} and saved at {machine.save_rate / GB:.2f} GB/s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
