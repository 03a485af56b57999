"""Grow a DeepSpeed checkpoint shard by shard; DeepSpeed's own loader takes the result."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from lag_megatron.checkpoint.names import layers_in
from lag_megatron.checkpoint.zero import ZeroCheckpoint, resolve
from lag_megatron.errors import LagError, PlanError
from lag_megatron.growth.layer_map import draw
from lag_megatron.growth.materialize import Growth, grow_checkpoint
from lag_megatron.growth.operators import OPERATORS
from lag_megatron.growth.plan import MOMENT_POLICIES, GrowthPlan


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and grow; 2 for a user's error."""
    options = _parser().parse_args(arguments)
    try:
        source = ZeroCheckpoint.open(resolve(options.source))
        plan = _plan(options, source)
        target = options.target / source.path.resolve().name
        growth = Growth(source, plan)
        print(f"{source.path} -> {target}")
        print(f"layers {plan.source_layers} -> {plan.target_layers}: {draw(plan.layer_map)}")
        print(f"to write: {growth.bytes_to_write / 2**20:.1f} MiB")
        if options.dry_run:
            return 0
        grow_checkpoint(source.path, target, plan, progress=_progress)
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
    add("--dry-run", action="store_true", help="show what would be done and write nothing")
    return parser


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
    for needed in ("operator", "layers"):
        if needed not in given:
            raise PlanError(f"--{needed} is missing: give --operator and --layers, or --plan.")
    target_layers = given.pop("layers")
    model = source.client_state.get("model") or {}
    defaults = {"init_std": model["init_std"]} if "init_std" in model else {}
    return GrowthPlan(
        source_layers=len(layers_in(source.layout.shapes)),
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


def _progress(ranks: Iterable[Any]) -> Iterable[Any]:
    return tqdm(ranks, unit="rank", disable=not sys.stderr.isatty())


if __name__ == "__main__":
    sys.exit(main())
