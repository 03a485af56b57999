"""The plan of a study as text: what each arm trains, and what that costs."""

from collections.abc import Iterator

from lag_megatron.config import RunConfig
from lag_megatron.config.schema.stage_schedule import stage_ranges
from lag_megatron.planning.random_paths import mean_layers_run
from lag_megatron.study.launch import StudyFolder
from lag_megatron.study.plan import PlannedRun, StudyPlan


def plan_text(plan: StudyPlan, folder: StudyFolder) -> str:
    """The arms at the budget, and how many of the runs have finished already."""
    return "\n".join(_lines(plan, folder))


def layers_text(config: RunConfig) -> Iterator[str]:
    """How many layers each stage has, after how many of them a step runs where it takes paths."""
    for number, steps in enumerate(stage_ranges(config.stages)):
        layers = config.layers_of(number)
        run = mean_layers_run(config, steps)
        yield str(layers) if run == layers else f"{run:.3g}/{layers}"


def _lines(plan: StudyPlan, folder: StudyFolder) -> Iterator[str]:
    settings = plan.study.config
    yield f"budget: {plan.budget:.4e} FLOPs for each run, search included"
    yield f"vocabulary: {plan.vocab_size:,} ({plan.vocab_origin})"
    shown: dict[str, PlannedRun] = {}
    for run in plan.runs:
        shown.setdefault(run.arm, run)
    width = max(map(len, shown))
    yield f"{'arm':<{width}} {'FLOPs':>10} {'below':>10} {'search':>7}  layers x steps"
    for arm, run in shown.items():
        config, cost = run.config, run.cost
        stages = ", ".join(
            f"{layers} x {stage.steps:,}"
            for layers, stage in zip(layers_text(config), config.stages, strict=True)
        )
        below, share = plan.budget - cost.total, cost.search / cost.total
        yield f"{arm:<{width}} {cost.total:>10.4e} {below:>10.3e} {share:>7.1%}  {stages}"
    done = sum(folder.finished(run) for run in plan.runs)
    yield (
        f"{len(plan.runs)} runs: {len(settings.arms)} arms x {len(settings.learning_rates)} "
        f"learning rates x {len(settings.seeds)} seeds; {done} finished"
    )
