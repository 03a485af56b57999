"""Rules replayed on recorded searches: probe steps, evaluations and regret of each."""

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lag_megatron.config import GrowthConfig
from lag_megatron.errors import RunError
from lag_megatron.report.stats.recorded_search import RecordedSearch, read_search
from lag_megatron.report.stats.rule_comparison import compare_rules, loss_curves, settings_of
from lag_megatron.selection import Evaluation, rung_value, spearman
from lag_megatron.selection.analysis import finished_curves

SMALLEST_POOL = 16
VALUES = ("last", "mean", "ema")
ETAS = (2, 3, 4)
GUARDS = (0.8, 0.4, -1.0)
_DEFAULTS = GrowthConfig()
# Losses are recorded to six decimals.
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule with rungs at parts of the lag, the last of which decides; None takes the default."""

    name: str
    rungs: tuple[float, ...] | None = None
    eta: int = _DEFAULTS.eta
    value: str = _DEFAULTS.compared_by
    guard: float = _DEFAULTS.rank_bar

    def settings(self, lag: int) -> list[str]:
        """As ``key=value`` over those of a search."""
        rungs = [round(part * lag) for part in self.rungs or ()]
        found = [f"rungs={rungs}", f"eta={self.eta}", f"rung_value={self.value}", "eval_steps=[]"]
        if rungs:
            found.append(f"lag={rungs[-1]}")
        return [*found, f"min_rank_correlation={self.guard:g}"]

    def __str__(self) -> str:
        """One line of a table."""
        parts = "1/4 1/2 1" if self.name == "halving" else "1"
        if self.rungs:
            parts = " ".join(f"1/{round(1 / part)}" if part < 1 else "1" for part in self.rungs)
        eta = f" eta {self.eta}" if self.name == "halving" else ""
        guard = "no guard" if self.guard == -1 else f"guard {self.guard:g}"
        guarded = f", {guard}" if self.name == "halving" else ""
        return f"{self.name}{eta}, rungs at {parts} k, {self.value}{guarded}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a rule on one search; regrets in nats and as a share of the final spread."""

    steps: int
    evaluations: int
    chosen: str
    regret: float
    relative_regret: float


DEFAULT = Rule(_DEFAULTS.rule)
# The paper's rule: the loss at k.
LAG = Rule("lag", value="last")


def rules_figures(folder: Path) -> dict[str, float]:
    """Figures of the default rule over all recorded searches of a folder, with tables.

    Raises:
        RunError: if there is none, or one does not hold what the default needs.
    """
    searches = [read_search(path) for path in sorted(folder.glob("*.json*"))]
    searches = [search for search in searches if len(search.pool) >= SMALLEST_POOL]
    if not searches:
        raise RunError(f"{folder}: no recorded search of {SMALLEST_POOL} candidates or more.")
    figures = _default_against_lag(searches)
    print()
    _print_predictions(searches)
    print()
    _print_rules(searches)
    return figures


def outcome_of(search: RecordedSearch, rule: Rule) -> Outcome:
    """What the rule would have done.

    Raises:
        RunError: where the recording has no evaluation that the rule needs.
    """
    settings = rule.settings(_lag(search))
    found = compare_rules(search, [rule.name], settings)["rules"][0]
    if found["regret"] is None:
        raise RunError(f"{search.name}: {found['chosen']} was not trained to the end.")
    evaluated = settings_of(search, rule.name, settings).evaluation_steps()
    count = sum(step <= c["steps"] for c in found["candidates"] for step in evaluated)
    return Outcome(
        steps=found["probe_steps"],
        evaluations=count * (2 if rule.value == "ema" else 1),
        chosen=found["chosen"],
        regret=found["regret"],
        relative_regret=found["relative_regret"],
    )


def _lag(search: RecordedSearch) -> int:
    lag = search.config["lag"]
    if not isinstance(lag, int):
        raise RunError(f"{search.name}: its lag is {lag!r}; a number of steps is needed.")
    return lag


def _default_against_lag(searches: Sequence[RecordedSearch]) -> dict[str, float]:
    print(f"{len(searches)} recorded searches: {DEFAULT} against LAG@k; regrets in nats, then as")
    print("shares of the final spread")
    print(
        f"{'search':<24} {'pool':>4} {'k':>4} {'steps':>6} {'of |G|k':>7} {'evals':>11}"
        f"  {'chosen':<22} {'LAG@k':<22} {'regret':>8} {'LAG@k':>8} {'rel.':>6} {'LAG@k':>6}"
    )
    ratios: list[float] = []
    pairs: list[tuple[Outcome, Outcome]] = []
    for search in searches:
        ours, lag = outcome_of(search, DEFAULT), outcome_of(search, LAG)
        pairs.append((ours, lag))
        ratios.append(ours.steps / lag.steps)
        print(
            f"{search.name:<24} {len(search.pool):>4} {_lag(search):>4} {ours.steps:>6} "
            f"{ratios[-1]:>7.3f} {ours.evaluations:>5} {lag.evaluations:>5}  {ours.chosen:<22} "
            f"{lag.chosen:<22} {ours.regret:>8.4f} {lag.regret:>8.4f} "
            f"{ours.relative_regret:>6.3f} {lag.relative_regret:>6.3f}"
        )
    no_worse = [_no_worse(ours, lag) for ours, lag in pairs]
    print(f"no more regret than LAG@k in {sum(no_worse)} of {len(searches)}")
    print("evals: evaluations of all candidates, then LAG@k's, which are at 0 and k")
    return {
        "probe_step_ratio": statistics.fmean(ratios),
        "searches_no_worse": statistics.fmean(no_worse),
        "searches": float(len(searches)),
        "default_relative_regret": statistics.fmean(o.relative_regret for o, _ in pairs),
        "lag_relative_regret": statistics.fmean(lag.relative_regret for _, lag in pairs),
        "default_evaluations_a_candidate": statistics.fmean(
            o.evaluations / len(s.pool) for (o, _), s in zip(pairs, searches, strict=True)
        ),
    }


def _no_worse(ours: Outcome, other: Outcome) -> bool:
    return ours.regret <= other.regret + ROUNDING


def _print_predictions(searches: Sequence[RecordedSearch]) -> None:
    print("mean Spearman correlation of a rung's value with the final loss, by part of the lag")
    parts = (0.25, 0.5, 1.0)
    print(f"{'value':<6}" + "".join(f"{f'{part:g} k':>8}" for part in parts))
    for value in VALUES:
        cells = [_mean(_correlation(s, value, part) for s in searches) for part in parts]
        print(f"{value:<6}" + "".join(_cell(cell, 8) for cell in cells))


def _correlation(search: RecordedSearch, value: Any, part: float) -> float | None:
    """Over the candidates that have both; only what the default would evaluate counts."""
    lag = _lag(search)
    planned = set(GrowthConfig(lag=lag).evaluation_steps())
    ended = finished_curves(loss_curves(search))
    final = {id_: curve[max(curve)] for id_, curve in ended.items()}
    early = {
        id_: rung_value(
            value,
            [Evaluation.of_row(row) for row in search.curves[id_] if row["step"] in planned],
            math.ceil(part * lag),
        )
        for id_ in final
    }
    return spearman(early, final)


def _variants() -> Iterator[Rule]:
    """Those that the default was chosen from."""
    for value in VALUES:
        yield Rule("lag", value=value)
        for part in (0.5, 0.25):
            yield Rule("lag", rungs=(part,), value=value)
    for eta, value, guard in itertools.product(ETAS, VALUES, GUARDS):
        yield Rule("halving", eta=eta, value=value, guard=guard)
    for eta in ETAS:
        yield Rule("halving", rungs=(0.5, 1.0), eta=eta)
        yield Rule("halving", rungs=(0.125, 0.25, 0.5, 1.0), eta=eta, guard=-1.0)


def _print_rules(searches: Sequence[RecordedSearch]) -> None:
    print("rules and rung values: means over the searches that recorded what each needs")
    print(
        f"{'rule':<56} {'searches':>8} {'of |G|k':>8} {'evals/|G|':>9} {'regret':>8} {'rel.':>6} "
        f"{'no worse':>8}"
    )
    lags = {search.name: outcome_of(search, LAG) for search in searches}
    ranked: list[tuple[float, float, Rule]] = []
    for rule in _variants():
        found = [(s, o) for s in searches if (o := _try(s, rule)) is not None]
        if not found:
            print(f"{rule!s:<56} {0:>8}")
            continue
        ratio = statistics.fmean(o.steps / (len(s.pool) * _lag(s)) for s, o in found)
        relative = statistics.fmean(o.relative_regret for _, o in found)
        no_worse = [_no_worse(o, lags[s.name]) for s, o in found]
        print(
            f"{rule!s:<56} {len(found):>8} {ratio:>8.3f} "
            f"{statistics.fmean(o.evaluations / len(s.pool) for s, o in found):>9.2f} "
            f"{statistics.fmean(o.regret for _, o in found):>8.4f} {relative:>6.3f} "
            f"{statistics.fmean(no_worse):>8.2f}"
        )
        if len(found) == len(searches):
            ranked.append((relative, ratio, rule))
    budget = next((ratio for _, ratio, rule in ranked if rule == DEFAULT), math.inf)
    best = min((r for r in ranked if r[1] <= budget * 1.02), key=lambda r: r[:2])
    print(f"best at the default's steps (within 2 %): {best[2]}, relative regret {best[0]:.3f}")


def _try(search: RecordedSearch, rule: Rule) -> Outcome | None:
    try:
        return outcome_of(search, rule)
    except RunError:
        return None


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.3f}':>{width}}"
