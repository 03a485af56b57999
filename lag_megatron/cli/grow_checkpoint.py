"""Grow a DeepSpeed checkpoint shard by shard, or move it to another number of ranks.

DeepSpeed's own loader takes the result.  Without --operator the model stays as it is and only its
topology changes.  With --link SOURCE is a universal checkpoint, or a distributed one of
Megatron-Core, whose values the grown one shares by hard links; only new values are written.
"""

import argparse
import sys
from pathlib import Path

from lag_megatron.checkpoint.open import MEGATRON, UNIVERSAL, detect, open_checkpoint
from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.state.source import UNSHARDED
from lag_megatron.checkpoint.storage.integrity import is_verifiable
from lag_megatron.checkpoint.writer.job import write
from lag_megatron.checkpoint.writer.progress_bar import progress_bar
from lag_megatron.checkpoint.zero.header import resolve_tag
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.cli.command import command
from lag_megatron.cli.growth_options import (
    add_growth_options,
    add_places,
    changes_topology,
    check_numbers,
    plan_of,
    topology_of,
)
from lag_megatron.cli.parser import command_parser, parse
from lag_megatron.errors import PlanError, printable
from lag_megatron.growth.apply.estimate import estimate_growth
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.apply.hardlink_dcp import hardlink_dcp
from lag_megatron.growth.apply.hardlink_universal import hardlink_universal
from lag_megatron.growth.apply.trainer_folder import trainer_files
from lag_megatron.growth.operators.layer_map import format_layer_map
from lag_megatron.targets.overlap import require_apart


@command(interrupted="The same command goes on from here.")
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and grow; 2 for a user's error."""
    return run(parse(_parser(), argv))


def run(options: argparse.Namespace) -> int:
    """Grow as the options say; 2 for a user's error."""
    check_numbers(options)
    if options.link:
        _link(options)
    else:
        _grow(options)
    return 0


def _grow(options: argparse.Namespace) -> None:
    source = ZeroCheckpoint.open(resolve_tag(options.source))
    plan = plan_of(options, source, may_stay=changes_topology(options))
    topology = topology_of(options, source.topology)
    target = options.target / source.path.resolve().name
    require_apart(target, source.path)
    growth = GrownState(source, plan, topology)
    _print_growth(growth, target, options)
    for line in trainer_files(growth, target).describe():
        print(printable(line))
    if not is_verifiable(source.path):
        print(
            printable(f"{source.path}: unverified, it has no checksums for all it holds"),
            file=sys.stderr,
        )
    if options.dry_run:
        return
    with progress_bar(growth.bytes_to_write) as written:
        grow_checkpoint(
            source.path,
            target,
            plan,
            topology=topology,
            workers=options.workers,
            written=written,
            lock=options.lock,
            allow_nonfinite=options.allow_nonfinite,
        )
    print(
        printable(
            f"written: {target}, of {plan.target_layers} layers, with the source's parameter names"
        )
    )
    print(printable(f'to load it: load_checkpoint("{options.target}") of DeepSpeed'))


def _link(options: argparse.Namespace) -> None:
    if changes_topology(options):
        raise PlanError("--link keeps the topology: leave out what would change it.")
    source = open_checkpoint(options.source)
    kind = detect(source.path)
    jobs = {UNIVERSAL: hardlink_universal, MEGATRON: hardlink_dcp}
    if kind not in jobs:
        raise PlanError(
            f"{source.path}: a checkpoint of the kind {kind!r} has no file or entry for each "
            "tensor that could be shared. Convert it to universal or megatron first."
        )
    plan = plan_of(options, source, may_stay=False)
    target = options.target / source.path.resolve().name
    job = jobs[kind](GrownState(source, plan, UNSHARDED, options.allow_nonfinite), target)
    print(printable(f"{source.path} -> {target}"))
    print(
        f"layers {plan.source_layers} -> {plan.target_layers}: {format_layer_map(plan.layer_map)}"
    )
    print(f"to write: {job.needed / 2**20:.1f} MiB; all else is linked")
    print("linked values are not checked for NaN and infinities: lag-inspect --verify reads them")
    if not options.dry_run:
        write(job, workers=options.workers, lock=options.lock)
        print(printable(f"written: {target}, of {plan.target_layers} layers"))
        print(
            printable(
                f"its files are hard links to those of {source.path}: never change them in place"
            )
        )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        "SOURCE TARGET",
        "lag-grow ckpt grown --operator lag --set index=4 --set block_size=2 --layers 16",
        "lag-grow ckpt grown --plan plan.json --world-size 64 --workers 16",
    )
    add = parser.add_argument
    add_places(parser)
    add("--link", action="store_true", help="share the source's values instead of copying them")
    add_growth_options(parser)
    return parser


def _print_growth(growth: GrownState, target: Path, options: argparse.Namespace) -> None:
    plan = growth.plan
    print(printable(f"{growth.source.path} -> {target}"))
    if growth.topology != growth.source.topology:
        print(
            f"ranks {_topology_text(growth.source.topology)} -> {_topology_text(growth.topology)}"
        )
    if plan.operator != "identity":
        layers = format_layer_map(plan.layer_map)
        print(f"layers {plan.source_layers} -> {plan.target_layers}: {layers}")
    takes = estimate_growth(
        growth, workers=options.workers, folder=options.target if options.dry_run else None
    )
    print(f"to read: {takes.read / 2**20:.1f} MiB, to write: {takes.write / 2**20:.1f} MiB")
    if options.dry_run:
        norm = (growth.source.client_state.get("model") or {}).get("norm_position", "pre")
        keeps = "yes" if plan.preserves_function(norm) else "no"
        print(f"memory of {options.workers} workers: {takes.memory / 2**20:.0f} MiB")
        time = "unknown, it takes no file" if takes.seconds is None else f"{takes.seconds:.1f} s"
        print(f"time at this disk's rate: {time}")
        print(f"preserves the function: {keeps}")


def _topology_text(topology: Topology) -> str:
    return (
        f"ZeRO-{topology.zero_stage}, {topology.data_size} data-parallel x "
        f"{topology.tensor_size} tensor-parallel, {topology.precision}"
    )


if __name__ == "__main__":
    sys.exit(main())
