"""What the tools that grow checkpoints ask on the command line."""

import argparse
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from lag_megatron.checkpoint.families.layer_stack import count_layers, find_layer_stack
from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.state.source import CheckpointSource, unsharded_shapes
from lag_megatron.config.schema.param_names import read_param_names
from lag_megatron.errors import PlanError
from lag_megatron.growth.apply.grown_state import retarget
from lag_megatron.growth.operators import OPERATORS
from lag_megatron.growth.plan import MOMENT_POLICIES, GrowthPlan

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)
TOPOLOGY = ("world_size", "tensor_parallel", "zero_stage", "precision")
_PLAN = ("operator", "layers", "moments", "seed", "init_std")


def add_growth_options(parser: argparse.ArgumentParser) -> None:
    """The growth, the topology, and how many workers."""
    add = parser.add_argument
    add("--operator", metavar="NAME", help=f"one of {', '.join(OPERATORS)}")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an operator's option")
    add("--layers", type=int, metavar="N", help="number of layers after growing")
    add("--moments", choices=("auto", *MOMENT_POLICIES), help="Adam's moments of new layers")
    add("--seed", type=int, help="names the values of randomly initialised layers")
    add("--init-std", type=float, help="of them; the default is what the checkpoint says")
    add("--names", type=Path, metavar="FILE", help="YAML: roles of parameters, and the list of "
        "layers, where no table knows the model's names (README, Names and roles)")  # fmt: skip
    add("--plan", type=Path, metavar="FILE", help="a plan as JSON in place of all of the above")
    add("--world-size", type=int, metavar="N", help="ranks in all; the default is the source's")
    add("--tensor-parallel", type=int, metavar="N", help="ranks that share a layer's tensors")
    add("--zero-stage", type=int, choices=(0, 1, 2, 3), help="DeepSpeed's ZeRO stage")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of the forward weights")
    add("--workers", type=int, default=DEFAULT_WORKERS, metavar="N", help="files at a time")
    add("--dry-run", action="store_true", help="show what would be done and leave nothing behind")


def topology_of(options: argparse.Namespace, source: Topology) -> Topology:
    """The source's topology with what is given replaced.

    Raises:
        PlanError: if the ranks do not divide.
    """
    return retarget(
        source,
        world_size=options.world_size,
        tensor_size=options.tensor_parallel,
        zero_stage=options.zero_stage,
        precision=options.precision,
    )


def plan_of(options: argparse.Namespace, source: CheckpointSource, *, may_stay: bool) -> GrowthPlan:
    """The growth that is asked for.

    Args:
        options: of the command line.
        source: what is to grow.
        may_stay: whether no growth at all may be asked for.

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
    names = None if options.names is None else read_param_names(options.names)
    shapes = unsharded_shapes(source)
    if given.get("operator") == "identity":
        layers = count_layers(shapes, names)
        given.setdefault("layers", layers)
    else:
        stack = find_layer_stack(shapes, names)
        layers = len(stack.numbers) if stack else 0
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
        names=names,
        **(defaults | given),
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal; yields what several threads may tell."""
    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:

        def told(count: int) -> None:
            with lock:
                bar.update(count)

        yield told


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise PlanError(f"--set {text}: expected KEY=VALUE, e.g. --set index=4.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise PlanError(f"--set {text}: the value is not YAML.") from None
