"""Plan Staged Training: how long to train which size, and what that saves by the scaling law.

Without sizes: the published ones, and the published figures next to what the law gives.

  python tools/plan_stages.py --layers 4 8 16 --hidden 1024 --seq-length 1024 --batch 512
"""

import argparse
import difflib
import json
import math
import sys
from dataclasses import asdict, fields
from typing import Any

from lag_megatron.errors import ConfigError, LagError
from lag_megatron.planning.staged_training.plan import (
    BEST,
    GROWTH_SLOPES,
    OPTIMAL_SLOPE,
    GrowthKind,
    ModelShape,
    PlannedStage,
    StagePlan,
    Threshold,
    plan_stages,
    stages_yaml,
)
from lag_megatron.planning.staged_training.published import (
    BASE,
    FACTORS,
    LARGE,
    MEASURED_RATIOS,
    compare_published,
    halved,
)
from lag_megatron.planning.staged_training.scaling_law import ScalingLaw, learning_rate

NO_WIDTH = "Width is planned by the law only: this project has no operator that widens yet."
NOT_DOUBLED = "No configuration: the operator 'staged' only doubles the number of layers."


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and print; 2 for a user's error."""
    options = _parser().parse_args(arguments)
    try:
        sized = options.layers or options.hidden
        data = _planned(options) if sized else _published(options)
    except LagError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(data, indent=1, allow_nan=False))
    else:
        print("\n".join(_plan_lines(data) if sized else _published_lines(data)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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


def _plan(options: argparse.Namespace, shapes: list[ModelShape]) -> StagePlan:
    return plan_stages(
        shapes,
        law=_law(options.set),
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
    plan = _plan(options, _shapes(options.layers, options.hidden))
    per_step = _tokens_per_step(options)
    widened = any(stage.growth in ("width", "both") for stage in plan.stages)
    law = _law(options.set)
    text = stages_yaml(plan)
    rows = [_stage_data(stage, per_step, _log_base(options)) for stage in plan.stages]
    return {
        "law": asdict(law),
        "defaults": law == ScalingLaw(),
        "measured_ratios": any(getattr(options, f"ratio_{growth}") for growth in GROWTH_SLOPES),
        "tokens_per_step": per_step,
        "stages": rows,
        "compute": plan.compute,
        "scratch": {"steps": round(plan.scratch_steps), "compute": plan.scratch_compute},
        "saving": plan.saving,
        "yaml": text,
        "note": None if text else NO_WIDTH if widened else NOT_DOUBLED,
    }


def _stage_data(stage: PlannedStage, per_step: int | None, log_base: float) -> dict[str, Any]:
    size = stage.shape.parameters
    return {
        **asdict(stage.shape),
        "parameters": size,
        "growth": stage.growth,
        "ratio": stage.ratio,
        "enters_at_step": round(stage.entered),
        "ends_at_step": round(stage.ended),
        "steps": stage.steps,
        "tokens": None if per_step is None else stage.steps * per_step,
        "until_slope": stage.until_slope,
        "loss": stage.loss,
        "critical_batch_tokens": stage.critical_batch,
        "compute": stage.compute,
        "learning_rate": learning_rate(size, log_base=log_base),
    }


def _published(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for target in (BASE, LARGE):
        for growth in FACTORS:
            rows.append(_growth_data(options, growth, target))
    law = _law(options.set)
    found = [asdict(check) for check in compare_published(law, log_base=_log_base(options))]
    return {"law": asdict(law), "growths": rows, "checks": found, "note": NO_WIDTH}


def _growth_data(
    options: argparse.Namespace, growth: GrowthKind, target: ModelShape
) -> dict[str, Any]:
    plan = _plan(options, [halved(target, growth), target])
    small, large = plan.stages
    return {
        "growth": growth,
        "small": str(small.shape),
        "large": str(large.shape),
        "until_slope": small.until_slope,
        "grows_at_step": round(small.ended),
        "enters_at_step": round(large.entered),
        "ends_at_step": round(large.ended),
        "ratio": large.ratio,
        "saving": plan.saving,
    }


def _plan_lines(data: dict[str, Any]) -> list[str]:
    stages, per_step = data["stages"], data["tokens_per_step"]
    head = ["layers", "hidden", "parameters", "grown in", "rho", "enters at", "ends at", "slope",
            "steps", "compute", "rate"]  # fmt: skip
    rows = [
        [
            f"{row['num_layers']}", f"{row['hidden_size']}", f"{row['parameters']:,}",
            row["growth"] or "-", "-" if row["ratio"] is None else f"{row['ratio']:.3f}",
            f"{row['enters_at_step']:,}", f"{row['ends_at_step']:,}", f"{row['until_slope']:.4f}",
            f"{row['steps']:,}", f"{row['compute']:.3g}", f"{row['learning_rate']:.3g}",
        ]
        for row in stages
    ]  # fmt: skip
    if per_step is not None:
        head.append("tokens")
        for cells, row in zip(rows, stages, strict=True):
            cells.append(f"{row['tokens']:,}")
    scratch = data["scratch"]
    low, high = (pick(row["critical_batch_tokens"] for row in stages) for pick in (min, max))
    by = "the law and the measured rho" if data["measured_ratios"] else "the law"
    yours = "" if per_step is None else f"; yours is {per_step:,}"
    lines = [
        *_table(head, rows),
        "",
        f"All stages: {data['compute']:.3g} FLOPs. The last size from scratch: "
        f"{scratch['steps']:,} steps, {scratch['compute']:.3g} FLOPs.",
        f"Saving: {data['saving']:.1%} of the compute, by {by}.",
        f"The steps are those of the critical batch size, {low:,.0f} to {high:,.0f} tokens at the "
        f"stages' ends{yours}.",
    ]
    if not data["defaults"]:
        lines.append("The default thresholds are those of the default constants: see 'best'.")
    if data["yaml"] is None:
        return [*lines, data["note"]]
    slopes = ", ".join(f"{row['until_slope']:.4g}" for row in stages)
    return [*lines, f"With measured slopes instead: until_slope {slopes}.", "", data["yaml"]]


def _published_lines(data: dict[str, Any]) -> list[str]:
    head = ["growth", "small", "large", "slope", "grows at", "enters at", "ends at", "rho",
            "saving"]  # fmt: skip
    rows = [
        [
            row["growth"], row["small"], row["large"], f"{row['until_slope']:.4f}",
            f"{row['grows_at_step']:,}", f"{row['enters_at_step']:,}", f"{row['ends_at_step']:,}",
            f"{row['ratio']:.3f}", f"{row['saving']:.1%}",
        ]
        for row in data["growths"]
    ]  # fmt: skip
    figures = [
        [row["name"], f"{row['published']:.6g}", f"{row['law']:.6g}",
         " ".join(filter(None, (row["verdict"], row["note"] and f"({row['note']})")))]
        for row in data["checks"]
    ]  # fmt: skip
    return [
        *_table(head, rows),
        "",
        *_table(["published figure", "published", "law", ""], figures, left=(0, 3)),
        "",
        data["note"],
    ]


def _table(head: list[str], rows: list[list[str]], *, left: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


if __name__ == "__main__":
    sys.exit(main())
