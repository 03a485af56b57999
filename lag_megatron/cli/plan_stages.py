"""Plan Staged Training: how long to train which size, and what that saves by the scaling law.

Without sizes: the published ones, and the published figures next to what the law gives.
"""

import argparse
import difflib
import json
import math
import sys
from dataclasses import fields
from functools import partial
from typing import Any

from lag_megatron.cli.command import command
from lag_megatron.cli.parser import command_parser, parse
from lag_megatron.cli.stage_tables import plan_lines, published_lines
from lag_megatron.errors import ConfigError
from lag_megatron.planning.staged_training.plan import (
    BEST,
    GROWTH_SLOPES,
    OPTIMAL_SLOPE,
    ModelShape,
    Threshold,
    plan_stages,
)
from lag_megatron.planning.staged_training.published import MEASURED_RATIOS
from lag_megatron.planning.staged_training.scaling_law import ScalingLaw
from lag_megatron.planning.staged_training.summary import Planner, plan_data, published_data


@command()
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and print; 2 for a user's error."""
    options = parse(_parser(), argv)
    if options.layers or options.hidden:
        data, lines = _planned(options), plan_lines
    else:
        data, lines = _published(options), published_lines
    print(json.dumps(data, indent=1, allow_nan=False) if options.json else "\n".join(lines(data)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        "",
        "lag-plan-stages",
        "lag-plan-stages --layers 4 8 16 --hidden 1024 --seq-length 1024 --batch 512",
    )
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[], metavar="N", help="of each stage, or of all")
    add("--hidden", type=int, nargs="+", default=[], metavar="N", help="of each stage, or of all")
    add("--tau-optimal", type=_threshold, default=OPTIMAL_SLOPE, metavar="T",
        help=f"slope where the last stage ends; 'best': the law's ({OPTIMAL_SLOPE})")  # fmt: skip
    for growth, slope in GROWTH_SLOPES.items():
        add(f"--tau-{growth}", type=_threshold, default=slope, metavar="T",
            help=f"slope at which to grow ({growth}); 'best': the law's ({slope})")  # fmt: skip
        add(f"--ratio-{growth}", type=float, metavar="RHO",
            help=f"measured, for the law's; published: {MEASURED_RATIOS[growth]}")  # fmt: skip
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help=f"a constant of the law: {', '.join(_constants())}")  # fmt: skip
    add("--log-base", choices=("10", "e"), default="10", help="of the learning rate's formula (10)")
    add("--seq-length", type=int, metavar="N", help="with --batch: says tokens, too")
    add("--batch", type=int, metavar="N", help="sequences of a global batch")
    add("--json", action="store_true", help="print JSON")
    return parser


def _threshold(text: str) -> Threshold:
    return BEST if text == BEST else float(text)


def _constants() -> list[str]:
    return [field.name for field in fields(ScalingLaw)]


def _law(settings: list[str]) -> ScalingLaw:
    values: dict[str, float] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in _constants():
            near = difflib.get_close_matches(name, _constants(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"--set {setting}: expected NAME=VALUE, one of {', '.join(_constants())}.{hint}"
            )
        try:
            values[name] = float(text)
        except ValueError:
            raise ConfigError(f"--set {setting}: expected a number, e.g. {name}=0.1.") from None
    return ScalingLaw(**values)


def _shapes(layers: list[int], hidden: list[int]) -> list[ModelShape]:
    count = max(len(layers), len(hidden))
    if not layers or not hidden or {len(layers), len(hidden)} - {1, count}:
        raise ConfigError(
            f"--layers has {len(layers)} values and --hidden {len(hidden)}: give both, each one "
            f"value or one for each stage, e.g. --layers 4 8 16 --hidden 1024."
        )
    pairs = zip(layers * (count // len(layers)), hidden * (count // len(hidden)), strict=True)
    return [ModelShape(*pair) for pair in pairs]


def _tokens_per_step(options: argparse.Namespace) -> int | None:
    given = (options.seq_length, options.batch)
    if given == (None, None):
        return None
    if None in given or min(given) < 1:
        raise ConfigError(
            f"--seq-length {given[0]}, --batch {given[1]}: give both, each 1 or more, or neither."
        )
    return int(given[0] * given[1])


def _planner(options: argparse.Namespace, law: ScalingLaw) -> Planner:
    return partial(
        plan_stages,
        law=law,
        optimal=options.tau_optimal,
        slopes={growth: getattr(options, f"tau_{growth}") for growth in GROWTH_SLOPES},
        ratios={
            growth: ratio
            for growth in GROWTH_SLOPES
            if (ratio := getattr(options, f"ratio_{growth}")) is not None
        },
    )


def _log_base(options: argparse.Namespace) -> float:
    return math.e if options.log_base == "e" else 10.0


def _planned(options: argparse.Namespace) -> dict[str, Any]:
    shapes = _shapes(options.layers, options.hidden)
    law = _law(options.set)
    return plan_data(
        _planner(options, law)(shapes),
        law,
        measured_ratios=any(getattr(options, f"ratio_{growth}") for growth in GROWTH_SLOPES),
        tokens_per_step=_tokens_per_step(options),
        log_base=_log_base(options),
    )


def _published(options: argparse.Namespace) -> dict[str, Any]:
    law = _law(options.set)
    return published_data(law, _planner(options, law), log_base=_log_base(options))


if __name__ == "__main__":
    sys.exit(main())
