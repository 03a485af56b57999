"""The planned cost of a growth event's search, beyond the run's own steps."""

from dataclasses import dataclass

from lag_megatron.config import RunConfig
from lag_megatron.config.schema.stage_schedule import stage_ranges
from lag_megatron.planning.cost import steps_flops, validation_flops_per_token
from lag_megatron.planning.random_paths import with_path_length
from lag_megatron.selection import planned_rungs


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchCost:
    """The planned cost of one growth event.

    A pool of one compares nothing: its steps and evaluations are the run's own.

    Attributes:
        candidates: size of the pool.
        probe_steps: optimizer steps of all candidates, the winner's included.
        kept_steps: the winner's, which are the first steps of the stage that follows.
        evaluations: of the weights, over all candidates.
        averaged_evaluations: of averaged weights, for the rung value ``ema``.
        flops_per_step: floating-point operations of one optimizer step of the grown model, on
            average over the paths that candidates have.
        flops_per_evaluation: of one pass over the validation set.
    """

    candidates: int
    probe_steps: int
    kept_steps: int
    evaluations: int
    averaged_evaluations: int
    flops_per_step: int
    flops_per_evaluation: int

    @property
    def extra_steps(self) -> int:
        """Optimizer steps beyond the winner's own."""
        return self.probe_steps - self.kept_steps

    @property
    def training_flops(self) -> int:
        """Of the extra steps."""
        return self.extra_steps * self.flops_per_step

    @property
    def validation_flops(self) -> int:
        """Of the evaluations, without those of averaged weights."""
        return self.evaluations * self.flops_per_evaluation

    @property
    def flops(self) -> int:
        """Everything that comparing costs; 0 for a pool of one."""
        if self.candidates == 1:
            return 0
        averaged = self.averaged_evaluations * self.flops_per_evaluation
        return self.training_flops + self.validation_flops + averaged


def search_cost(config: RunConfig, stage: int, *, candidates: int, vocab_size: int) -> SearchCost:
    """The planned cost of the growth event before ``stage``, with a pool of ``candidates``.

    Where the rule may save or add steps (``halving`` with its guard, lag ``auto``), this follows
    :func:`~lag_megatron.selection.planned_rungs`; the real cost is in ``decision.json``.
    """
    growth = config.growth_before(stage)
    shape = {"num_layers": config.layers_of(stage), "vocab_size": vocab_size}
    probe_steps, kept_steps = _probe_steps(config, stage, candidates=candidates)
    each = len(growth.evaluation_steps())
    return SearchCost(
        candidates=candidates,
        probe_steps=probe_steps,
        kept_steps=kept_steps,
        evaluations=candidates * each,
        # Right after growth the average is the weights.
        averaged_evaluations=candidates * (each - 1) if growth.compared_by == "ema" else 0,
        flops_per_step=_flops_per_step(config, stage, steps=kept_steps, vocab_size=vocab_size),
        flops_per_evaluation=config.data.validation_tokens
        * validation_flops_per_token(config, **shape),
    )


def _flops_per_step(config: RunConfig, stage: int, *, steps: int, vocab_size: int) -> int:
    """On average over the first ``steps`` steps of the stage and the paths that are tried."""
    start = stage_ranges(config.stages)[stage].start
    steps_run = range(start, start + max(1, min(steps, config.stages[stage].steps)))
    tried = [
        with_path_length(config, stage, length)
        for length in config.growth_before(stage).pool.path_length
    ] or [config]
    spent = sum(steps_flops(one, steps_run, vocab_size=vocab_size) for one in tried)
    return spent // (len(steps_run) * len(tried))


def _probe_steps(config: RunConfig, stage: int, *, candidates: int) -> tuple[int, int]:
    """Probe steps of all candidates, and the winner's, which are the run's own."""
    growth = config.growth_before(stage)
    if growth.exhaustive:
        return candidates * config.stages[stage].steps, config.stages[stage].steps
    steps = before = 0
    for rung, left in planned_rungs(growth, candidates=candidates):
        steps += left * (rung - before)
        before = rung
    return steps, before
