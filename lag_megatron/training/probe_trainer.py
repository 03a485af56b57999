"""What a search is given by a run: its context, and a trainer on DeepSpeed's engine."""

from dataclasses import dataclass, replace

from lag_megatron.distributed.world import World
from lag_megatron.engine.engine import Engine
from lag_megatron.growth.pool import Candidate
from lag_megatron.run.metrics import MetricRow
from lag_megatron.search.context import SearchContext
from lag_megatron.search.event import GrowthEvent
from lag_megatron.training.probe_costs import step_costs
from lag_megatron.training.training_context import TrainingContext

_ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True, slots=True)
class DeepSpeedProbeTrainer:
    """Trains candidates with the steps that the stage after the event takes.

    Attributes:
        context: with the batches of the engine's ranks.
        engine: of the event's target depth.
        stage: that follows the event.
    """

    context: TrainingContext
    engine: Engine
    stage: int

    def train_step(self, candidate: Candidate, step: int) -> tuple[MetricRow, bool]:
        """Take optimizer step ``step`` of the run with the candidate's paths."""
        context = self.context.with_paths(self.stage, candidate.path_length)
        return context.step(self.engine, step, stage=self.stage)

    def evaluate(self) -> list[float]:
        """Mean loss of each batch of the fixed validation set, in nats per label."""
        return self.context.evaluate(self.engine)


def search_context(context: TrainingContext, event: GrowthEvent) -> SearchContext:
    """What a search of ``event`` has to know of the run."""
    costs = step_costs(
        context.config,
        event,
        vocab_size=context.vocab_size,
        validation_tokens=context.loader.validation_tokens,
    )
    return SearchContext(
        run=context.run,
        stop=context.stop,
        costs=costs,
        checkpoint_interval=context.config.checkpoint.interval,
        # Where steps leave layers out, a later one may run more layers than the first did.
        equal_memory=not context.config.has_paths,
    )


def build_group_trainer(
    context: TrainingContext, event: GrowthEvent, group: World
) -> DeepSpeedProbeTrainer:
    """A trainer with an engine on the ranks of one probe group; collective on these ranks."""
    # Steps of accumulation that the user gave hold for all ranks together, not for a group.
    deepspeed = {k: v for k, v in context.config.deepspeed.items() if k != _ACCUMULATION}
    parallel = replace(context.config.parallel, world_size=None)
    engine = Engine(
        replace(context.config, parallel=parallel, deepspeed=deepspeed),
        group,
        num_layers=event.target_layers,
        vocab_size=context.vocab_size,
        draw_weights=False,
    )
    loader = context.loader.for_world(group)
    return DeepSpeedProbeTrainer(replace(context, loader=loader), engine, event.number)
