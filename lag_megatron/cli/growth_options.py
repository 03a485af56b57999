"""Options that the commands which grow checkpoints share, and what they ask for."""

import argparse
import os
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.state.source import CheckpointSource
from lag_megatron.cli.lock_option import add_lock_option
from lag_megatron.config.schema.param_names import read_param_names
from lag_megatron.config.schema.ranges import (
    MAX_LAYERS,
    MAX_SEED,
    MAX_WORKERS,
    require_positive,
    require_whole,
)
from lag_megatron.errors import PlanError
from lag_megatron.growth.apply.grown_state import retarget
from lag_megatron.growth.operators import OPERATORS
from lag_megatron.growth.plan import MOMENT_POLICIES, GrowthPlan
from lag_megatron.small_files import parse_yaml

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)
_TOPOLOGY = ("world_size", "tensor_parallel", "zero_stage", "precision")
_PLAN = ("operator", "layers", "moments", "seed", "init_std")


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the source and the target of a growth."""
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a tag directory, or one that holds `latest`")
    add("target", type=Path, metavar="TARGET", help="gets a directory named like the source's tag")


def add_growth_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the growth, of the topology, and how to write."""
    add = parser.add_argument
    add("--operator", metavar="NAME", help=f"one of {', '.join(OPERATORS)}")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an operator's option")
    add("--layers", type=int, metavar="N", help="number of layers after growing")
    add("--moments", choices=("auto", *MOMENT_POLICIES), help="Adam's moments of new layers")
    add("--seed", type=int, help="names the values of randomly initialised layers")
    add("--init-std", type=float, help="of them; the default is what the checkpoint says")
    add("--names", type=Path, metavar="FILE", help="YAML: roles of parameters, and the list of "
        "layers, where no table knows the model's names (docs/checkpoints.md)")  # fmt: skip
    add("--plan", type=Path, metavar="FILE", help="a plan as JSON in place of all of the above")
    add_topology_options(parser)


def add_topology_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the topology, and how to write."""
    add = parser.add_argument
    add("--world-size", type=int, metavar="N", help="ranks in all; the default is the source's")
    add("--tensor-parallel", type=int, metavar="N", help="ranks that share a layer's tensors")
    add("--zero-stage", type=int, choices=(0, 1, 2, 3), help="DeepSpeed's ZeRO stage")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of the forward weights")
    add("--workers", type=int, default=DEFAULT_WORKERS, metavar="N", help="files at a time")
    add_lock_option(parser)
    add("--allow-nonfinite", action="store_true", help="go on where values are NaN or infinite")
    add("--dry-run", action="store_true", help="show what would be done and leave nothing behind")


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers outside their range before anything is opened.

    Raises:
        PlanError: for the first of them.
    """
    require_whole(options.workers, "--workers", error=PlanError, least=1, most=MAX_WORKERS)
    if options.layers is not None:
        require_whole(options.layers, "--layers", error=PlanError, least=1, most=MAX_LAYERS)
    if options.seed is not None:
        require_whole(options.seed, "--seed", error=PlanError, most=MAX_SEED)
    if options.init_std is not None:
        require_positive(options.init_std, "--init-std", error=PlanError)


def changes_topology(options: argparse.Namespace) -> bool:
    """Whether an option names another topology than the source's."""
    return any(getattr(options, key) is not None for key in _TOPOLOGY)


def topology_of(
    options: argparse.Namespace, source: Topology, *, zero_stage: int | None = None
) -> Topology:
    """The source's topology with the given options replaced.

    Args:
        zero_stage: where ``--zero-stage`` is not given; by default the source's.

    Raises:
        PlanError: if the ranks do not divide.
    """
    return retarget(
        source,
        world_size=options.world_size,
        tensor_size=options.tensor_parallel,
        zero_stage=zero_stage if options.zero_stage is None else options.zero_stage,
        precision=options.precision,
    )


def plan_of(options: argparse.Namespace, source: CheckpointSource, *, may_stay: bool) -> GrowthPlan:
    """The growth that the options ask for.

    Args:
        source: the checkpoint to grow.
        may_stay: whether the model may stay as it is, where no option of a growth is given.

    Raises:
        PlanError: if it is incomplete or contradicts itself.
    """
    given = {key: getattr(options, key) for key in _PLAN if getattr(options, key) is not None}
    if options.plan is not None:
        if given or options.set or options.names is not None:
            raise PlanError("--plan says everything: leave out the options of the growth.")
        return GrowthPlan.read(options.plan)
    if not given and may_stay:
        given = {"operator": "identity"}
    operator, target_layers = given.pop("operator", None), given.pop("layers", None)
    if operator is None or (target_layers is None and operator != "identity"):
        missing = "operator" if operator is None else "layers"
        raise PlanError(
            f"--{missing} is missing: give --operator and --layers, or --plan, or a topology."
        )
    return GrowthPlan.for_source(
        source,
        operator=operator,
        target_layers=target_layers,
        options=dict(_setting(text) for text in options.set),
        names=None if options.names is None else read_param_names(options.names),
        **given,
    )


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise PlanError(f"--set {text}: expected KEY=VALUE, e.g. --set index=4.")
    where = f"--set {text}"
    return key, parse_yaml(value, where=where, what="a value as YAML", error=PlanError)
