"""Grow a DeepSpeed checkpoint shard by shard, or move it to another number of ranks.

DeepSpeed's own loader takes the result.  Without --operator the model stays as it is and only its
topology changes.
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from lag_megatron.checkpoint.integrity import is_verifiable
from lag_megatron.checkpoint.layout import Topology
from lag_megatron.checkpoint.names import layers_in
from lag_megatron.checkpoint.zero import ZeroCheckpoint, resolve
from lag_megatron.errors import LagError, PlanError
from lag_megatron.growth.estimate import estimate
from lag_megatron.growth.layer_map import draw
from lag_megatron.growth.materialize import Growth, retarget
from lag_megatron.growth.offline import grow_checkpoint
from lag_megatron.growth.operators import OPERATORS
from lag_megatron.growth.plan import MOMENT_POLICIES, GrowthPlan

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)
_TOPOLOGY = ("world_size", "tensor_parallel", "zero_stage", "precision")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and grow; 2 for a user's error."""
    options = _parser().parse_args(arguments)
    try:
        if options.workers < 1:
            raise PlanError(f"--workers {options.workers}: expected at least 1.")
        source = ZeroCheckpoint.open(resolve(options.source))
        plan, topology = _plan(options, source), _topology(options, source.topology)
        target = options.target / source.path.resolve().name
        growth = Growth(source, plan, topology)
        _announce(growth, target, options)
        if not is_verifiable(source.path):
            print(
                f"{source.path}: unverified, it has no checksums for all it holds", file=sys.stderr
            )
        if options.dry_run:
            return 0
        with tqdm(
            total=growth.bytes_to_write,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        ) as bar:
            grow_checkpoint(
                source.path,
                target,
                plan,
                topology=topology,
                workers=options.workers,
                written=_locked(bar.update),
            )
        print(f'written: DeepSpeed loads it with load_checkpoint("{options.target}")')
    except LagError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a tag directory, or one that holds `latest`")
    add("target", type=Path, metavar="TARGET", help="gets a directory named like the source's tag")
    add("--operator", metavar="NAME", help=f"one of {', '.join(OPERATORS)}")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an operator's option")
    add("--layers", type=int, metavar="N", help="number of layers after growing")
    add("--moments", choices=("auto", *MOMENT_POLICIES), help="Adam's moments of new layers")
    add("--seed", type=int, help="names the values of randomly initialised layers")
    add("--init-std", type=float, help="of them; the default is what the checkpoint says")
    add("--plan", type=Path, metavar="FILE", help="a plan as JSON in place of all of the above")
    add("--world-size", type=int, metavar="N", help="ranks in all; the default is the source's")
    add("--tensor-parallel", type=int, metavar="N", help="ranks that share a layer's tensors")
    add("--zero-stage", type=int, choices=(0, 1, 2, 3), help="DeepSpeed's ZeRO stage")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of the forward weights")
    add("--workers", type=int, default=DEFAULT_WORKERS, metavar="N", help="shards at a time")
    add("--dry-run", action="store_true", help="show what would be done and leave nothing behind")
    return parser


def _announce(growth: Growth, target: Path, options: argparse.Namespace) -> None:
    plan = growth.plan
    print(f"{growth.source.path} -> {target}")
    if growth.topology != growth.source.topology:
        print(f"ranks {_spread(growth.source.topology)} -> {_spread(growth.topology)}")
    if plan.operator != "identity":
        print(f"layers {plan.source_layers} -> {plan.target_layers}: {draw(plan.layer_map)}")
    takes = estimate(
        growth, workers=options.workers, folder=options.target if options.dry_run else None
    )
    print(f"to read: {takes.read / 2**20:.1f} MiB, to write: {takes.write / 2**20:.1f} MiB")
    if options.dry_run:
        norm = (growth.source.client_state.get("model") or {}).get("norm_position", "pre")
        keeps = "yes" if plan.preserves_function(norm) else "no"
        print(f"memory of {options.workers} workers: {takes.memory / 2**20:.0f} MiB")
        told = "unknown, it takes no file" if takes.seconds is None else f"{takes.seconds:.1f} s"
        print(f"time at this disk's rate: {told}")
        print(f"preserves the function: {keeps}")


def _spread(topology: Topology) -> str:
    return (
        f"ZeRO-{topology.zero_stage}, {topology.data_size} data-parallel x "
        f"{topology.tensor_size} tensor-parallel, {topology.precision}"
    )


def _topology(options: argparse.Namespace, source: Topology) -> Topology:
    return retarget(
        source,
        world_size=options.world_size,
        tensor_size=options.tensor_parallel,
        zero_stage=options.zero_stage,
        precision=options.precision,
    )


def _plan(options: argparse.Namespace, source: ZeroCheckpoint) -> GrowthPlan:
    given = {
        key: getattr(options, key)
        for key in ("operator", "layers", "moments", "seed", "init_std")
        if getattr(options, key) is not None
    }
    if options.plan is not None:
        if given or options.set:
            raise PlanError("--plan says everything: leave out the options of the growth.")
        return GrowthPlan.read(options.plan)
    layers = len(layers_in([*source.layout.shapes, *source.frozen.shapes]))
    if not given and any(getattr(options, key) is not None for key in _TOPOLOGY):
        given = {"operator": "identity"}
    if given.get("operator") == "identity":
        given.setdefault("layers", layers)
    for needed in ("operator", "layers"):
        if needed not in given:
            raise PlanError(
                f"--{needed} is missing: give --operator and --layers, or --plan, or a topology."
            )
    target_layers = given.pop("layers")
    model = source.client_state.get("model") or {}
    defaults = {"init_std": model["init_std"]} if "init_std" in model else {}
    return GrowthPlan(
        source_layers=layers,
        target_layers=target_layers,
        options=dict(_setting(text) for text in options.set),
        **(defaults | given),
    )


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise PlanError(f"--set {text}: expected KEY=VALUE, e.g. --set index=4.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise PlanError(f"--set {text}: the value is not YAML.") from None


def _locked(update: Callable[[int], object]) -> Callable[[int], None]:
    """A bar's update for several threads."""
    lock = threading.Lock()

    def locked(count: int) -> None:
        with lock:
            update(count)

    return locked


if __name__ == "__main__":
    sys.exit(main())
