"""The numbers of a study, all of them JSON: each run, each arm over its seeds, the comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from lag_megatron.errors import LagError, RunError
from lag_megatron.report.stats.run_files import Json
from lag_megatron.run.directory import claim
from lag_megatron.study.intervals import CONFIDENCE, MeanInterval, mean_interval, paired_difference
from lag_megatron.study.launch import StudyFolder
from lag_megatron.study.outcome import CurvePoint, RunOutcome, read_outcome
from lag_megatron.study.plan import PlannedRun, StudyPlan
from lag_megatron.study.plan_table import layers_text

LAST = "last"
AXES = ("flops", "tokens", "all_tokens", "seconds")

OutcomesBySeed = Mapping[int, RunOutcome]  # by seed


def study_results(plan: StudyPlan, folder: StudyFolder) -> Json:
    """Everything that the report says, from the run directories of a study alone.

    Runs that have not finished, or cannot be read, are listed as missing with the reason.
    """
    outcomes: dict[str, RunOutcome] = {}
    missing: dict[str, str] = {}
    for run in plan.runs:
        try:
            outcomes[run.name] = _read(run, folder)
        except LagError as error:
            missing[run.name] = str(error)
    settings = plan.study.config
    groups = _groups(plan, outcomes)
    reference = settings.reference
    return {
        "study": plan.study.name,
        "reference": reference,
        "seeds": list(settings.seeds),
        "learning_rates": list(settings.learning_rates),
        "budget": {"flops": plan.budget, "of": settings.budget.of},
        "vocab_size": plan.vocab_size,
        "confidence": CONFIDENCE,
        "runs": [_run(run, outcomes.get(run.name), missing) for run in plan.runs],
        "missing": missing,
        "arms": [
            _arm(plan, arm, rate, group, groups[reference, rate])
            for (arm, rate), group in groups.items()
        ],
        "best_against_last": _best_against_last(plan, groups),
        "own_best": _own_best(plan, groups),
    }


def flops_to_reach(curve: Sequence[CurvePoint], loss: float) -> float | None:
    """FLOPs at which a curve first reaches a loss, interpolated linearly; None if it never does."""
    for number, point in enumerate(curve):
        if point.loss <= loss:
            if number == 0:
                return point.flops
            before = curve[number - 1]
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.flops + share * (point.flops - before.flops)
    return None


def _read(run: PlannedRun, folder: StudyFolder) -> RunOutcome:
    directory = folder.run(run)
    if not directory.root.exists():
        raise RunError("not begun")
    if (directory.root / "config.yaml").exists():
        claim(directory, run.config)  # a run with other settings is none of this study
    return read_outcome(directory.root)


def _groups(
    plan: StudyPlan, outcomes: Mapping[str, RunOutcome]
) -> dict[tuple[str, str], dict[int, RunOutcome]]:
    settings = plan.study.config
    return {
        (arm, rate): {
            run.seed: outcomes[run.name]
            for run in plan.runs
            if (run.arm, run.learning_rate) == (arm, rate) and run.name in outcomes
        }
        for rate in settings.learning_rates
        for arm in settings.arms
    }


def _run(run: PlannedRun, outcome: RunOutcome | None, missing: Mapping[str, str]) -> Json:
    known: Json = {
        "name": run.name,
        "arm": run.arm,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "planned_flops": run.cost.total,
        "planned_search_flops": run.cost.search,
    }
    if outcome is None:
        return {**known, "state": "missing", "reason": missing[run.name]}
    end = asdict(outcome.end)
    return {
        **known,
        "state": "finished",
        **{axis: end[axis] for axis in AXES},
        "search_flops": outcome.search_flops,
        "vocab_size": outcome.vocab_size,
        "val_loss": outcome.final_loss,
        "curve": [asdict(point) for point in outcome.curve],
    }


def _arm(
    plan: StudyPlan, arm: str, rate: str, group: OutcomesBySeed, reference: OutcomesBySeed
) -> Json:
    run = next(r for r in plan.runs if (r.arm, r.learning_rate) == (arm, rate))
    config = run.config
    compared = arm != plan.study.config.reference
    return {
        "arm": arm,
        "learning_rate": rate,
        "seeds": list(group),
        "layers": [config.layers_of(stage) for stage in range(len(config.stages))],
        "layers_run": list(layers_text(config)),
        "stage_steps": [stage.steps for stage in config.stages],
        "steps": config.total_steps,
        "planned_flops": run.cost.total,
        "planned_search_share": run.cost.search / run.cost.total,
        **{axis: _mean([getattr(o.end, axis) for o in group.values()]) for axis in AXES},
        "search_share": _mean([o.search_flops / o.end.flops for o in group.values()]),
        "val_loss": _json(mean_interval(list(_final(group).values()))),
        "against_reference": _json(paired_difference(_final(group), _final(reference)))
        if compared
        else None,
        "to_reference": _to_reference(group, reference) if compared else None,
        "curve": _mean_curve(list(group.values())),
    }


def _to_reference(group: OutcomesBySeed, reference: OutcomesBySeed) -> Json:
    """Operations to the reference's final loss, seed by seed, and what that saves of its own."""
    seeds = [seed for seed in group if seed in reference]
    reached = {
        seed: flops
        for seed in seeds
        if (flops := flops_to_reach(group[seed].curve, reference[seed].final_loss)) is not None
    }
    saved = [1 - flops / reference[seed].end.flops for seed, flops in reached.items()]
    every = bool(seeds) and len(reached) == len(seeds)
    return {
        "reached": len(reached),
        "of": len(seeds),
        "flops": _mean(list(reached.values())) if every else None,
        "saving": _json(mean_interval(saved)) if every else None,
    }


def _mean_curve(outcomes: Sequence[RunOutcome]) -> list[Json]:
    """The mean over seeds at each point that all of them have."""
    by_place = [{(p.step, p.searches): p for p in outcome.curve} for outcome in outcomes]
    places = sorted(set.intersection(*map(set, by_place))) if by_place else []
    found = []
    for place in places:
        points = [curve[place] for curve in by_place]
        loss = mean_interval([point.loss for point in points])
        assert loss is not None
        costs = {axis: _mean([getattr(point, axis) for point in points]) for axis in AXES}
        found.append(
            {"step": place[0], **costs, "loss": loss.mean, "low": loss.low, "high": loss.high}
        )
    return found


def _best_against_last(
    plan: StudyPlan, groups: Mapping[tuple[str, str], OutcomesBySeed]
) -> list[Json]:
    """For each learning rate, the arm with the lowest mean loss against the arm ``last``."""
    settings = plan.study.config
    if LAST not in settings.arms:
        return []
    found = []
    for rate in settings.learning_rates:
        losses = {arm: _final(groups[arm, rate]) for arm in settings.arms if groups[arm, rate]}
        if LAST in losses:
            best = min(losses, key=lambda arm: sum(losses[arm].values()) / len(losses[arm]))
            difference = None if best == LAST else paired_difference(losses[best], losses[LAST])
            found.append({"learning_rate": rate, "best": best, "difference": _json(difference)})
    return found


def _own_best(plan: StudyPlan, groups: Mapping[tuple[str, str], OutcomesBySeed]) -> list[Json]:
    """Each arm at the learning rate that suits it best, against the reference at its best."""
    settings = plan.study.config
    rates: dict[str, str] = {}
    for arm in settings.arms:
        means = {
            rate: found.mean
            for rate in settings.learning_rates
            if (found := mean_interval(list(_final(groups[arm, rate]).values()))) is not None
        }
        if means:
            rates[arm] = min(means, key=means.__getitem__)
    if settings.reference not in rates or len(settings.learning_rates) == 1:
        return []
    theirs = _final(groups[settings.reference, rates[settings.reference]])
    return [
        {
            "arm": arm,
            "learning_rate": rate,
            "reference_learning_rate": rates[settings.reference],
            "difference": _json(paired_difference(_final(groups[arm, rate]), theirs)),
        }
        for arm, rate in rates.items()
        if arm != settings.reference
    ]


def _final(group: OutcomesBySeed) -> dict[int, float]:
    return {seed: outcome.final_loss for seed, outcome in group.items()}


def _mean(values: Sequence[float]) -> float | None:
    found = mean_interval(values)
    return None if found is None else found.mean


def _json(found: MeanInterval | None) -> Json | None:
    return None if found is None else {**asdict(found), "holds_zero": found.holds_zero}
