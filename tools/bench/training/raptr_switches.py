#!/usr/bin/env python3
"""Whether the training loss jumps where a run's paths lengthen.

python tools/bench/training/raptr_switches.py RUN_DIR… [--control RUN_DIR…] [--window 25]
                                              [--json FILE]

At each switch the mean loss of the steps after it, less that of the steps before it, is compared
with the same difference at every place inside the two stages, where the length stays: its distance
from their mean, in their standard deviations.  Above 2 or so would be a jump up.  A control for
each run, of the same seed and data, has seen the same batches: its losses are subtracted, so that
what is left does not depend on how hard a batch is.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lag_megatron.errors import RunError
from lag_megatron.planning.random_paths import mean_layers_run, path_parts
from lag_megatron.report.stats.run import TRAIN, series
from lag_megatron.report.stats.run_files import RunFiles, read_run
from tools.bench.common.figures import write_figures


@dataclass(frozen=True, slots=True)
class Switch:
    """A place where the length of paths changes; losses in nats.

    Attributes:
        step: steps taken before it.
        lengths: layers that run before and after.
        change: of the mean loss over a window.
        usual: mean of the same change inside the stages.
        noise: its standard deviation there.
    """

    step: int
    lengths: tuple[float, float]
    change: float
    usual: float
    noise: float

    @property
    def deviations(self) -> float:
        """How far the change lies above the usual one."""
        return (self.change - self.usual) / self.noise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, nargs="+")
    parser.add_argument("--control", type=Path, nargs="+", default=[], metavar="RUN_DIR")
    parser.add_argument("--window", type=int, default=25, help="steps (default: 25)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    print(
        f"{'run':<22} {'step':>6} {'layers':>10} {'change':>8} {'usual':>8} {'noise':>7} {'sd':>6}"
    )
    if options.control and len(options.control) != len(options.run_dir):
        raise RunError(f"{len(options.control)} controls for {len(options.run_dir)} runs.")
    found: list[Switch] = []
    for run_dir, control in itertools.zip_longest(options.run_dir, options.control):
        files = read_run(run_dir)
        against = None if control is None else read_run(control)
        for switch in switches(files, window=options.window, control=against):
            before, after = switch.lengths
            print(
                f"{run_dir.name:<22} {switch.step:>6} {before:>4g} -> {after:<3g} "
                f"{switch.change:>8.4f} {switch.usual:>8.4f} {switch.noise:>7.4f} "
                f"{switch.deviations:>6.2f}"
            )
            found.append(switch)
    if not found:
        raise RunError("no path lengthens in these runs. Give runs that have paths.")
    deviations = [switch.deviations for switch in found]
    figures = {
        "raptr_switches": float(len(found)),
        "raptr_switch_deviations_max": max(deviations),
        "raptr_switch_deviations_mean": statistics.mean(deviations),
        "raptr_switch_change_max": max(switch.change for switch in found),
    }
    for name, value in figures.items():
        print(f"{name:<30} {value:8.4f}")
    if options.json:
        write_figures(options.json, figures)
    return 0


def switches(files: RunFiles, *, window: int, control: RunFiles | None = None) -> Iterator[Switch]:
    """Every switch of a run; losses are those above the control's, if there is one.

    Raises:
        RunError: if the window does not fit in, or steps are missing.
    """
    config, losses = files.config, _above(files, control)
    broken = {steps.start for _, steps, _ in path_parts(control.config)} if control else set()
    ranges = [steps for _, steps, _ in path_parts(config)]
    lengths = [mean_layers_run(config, steps) for steps in ranges]
    for number in range(1, len(ranges)):
        before, after = ranges[number - 1], ranges[number]
        if lengths[number] == lengths[number - 1]:
            continue
        if min(len(before), len(after)) <= window:
            raise RunError(
                f"{files.path}: {len(before)} and {len(after)} steps around the switch at step "
                f"{after.start} are too few for a window of {window}. Give a smaller --window."
            )
        end = min(after.stop, int(max(losses, default=0)))  # a control may be some steps shorter
        if before.start + 1 not in losses or end < after.start + window:
            raise RunError(f"{files.path}: has no losses up to step {after.stop}. Let it finish.")
        after = range(after.start, end)
        inside = [
            change_at(losses, step, window)
            for steps in (before, after)
            for step in range(steps.start + window, steps.stop - window + 1)
            if not any(step - window < start < step + window for start in broken)
        ]
        yield Switch(
            step=after.start,
            lengths=(lengths[number - 1], lengths[number]),
            change=change_at(losses, after.start, window),
            usual=statistics.mean(inside),
            noise=statistics.stdev(inside),
        )


def _above(files: RunFiles, control: RunFiles | None) -> dict[float, float]:
    losses = dict(series(files.metrics, TRAIN))
    if control is None:
        return losses
    same = (control.config.seed, control.config.data) == (files.config.seed, files.config.data)
    if not same:
        raise RunError(f"{control.path}: has another seed or other data than {files.path}.")
    there = dict(series(control.metrics, TRAIN))
    return {step: loss - there[step] for step, loss in losses.items() if step in there}


def change_at(losses: Mapping[float, float], step: int, window: int) -> float:
    """Mean loss of the ``window`` steps after the first ``step`` ones, less that of those before.

    Losses go by the number of steps taken, the step itself included.
    """
    after = [losses[taken] for taken in range(step + 1, step + window + 1)]
    before = [losses[taken] for taken in range(step - window + 1, step + 1)]
    return statistics.mean(after) - statistics.mean(before)


if __name__ == "__main__":
    raise SystemExit(main())
