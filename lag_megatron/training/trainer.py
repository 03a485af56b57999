"""The stage loop: train a stage, search how to grow, train the next one; resumes after a kill."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config.schema.stage_schedule import stage_ranges
from lag_megatron.distributed.world import World, topology_of
from lag_megatron.engine.engine import Engine
from lag_megatron.engine.save import save_engine
from lag_megatron.errors import CheckpointError
from lag_megatron.growth.pool import growth_pool
from lag_megatron.planning.cost import tokens_per_step
from lag_megatron.run.directory import step_of, tag_of
from lag_megatron.run.recorder import Recorder
from lag_megatron.run.resolved_config import as_journalled
from lag_megatron.run.signals import Stopped
from lag_megatron.search.decision import drop_losers
from lag_megatron.search.event import GrowthEvent
from lag_megatron.search.rank_groups import count_groups, probe_group
from lag_megatron.search.search import search
from lag_megatron.search.worker import ProbeWorker
from lag_megatron.training.init_from import growth_history, start_from
from lag_megatron.training.probe_costs import state_bytes
from lag_megatron.training.probe_trainer import (
    DeepSpeedProbeTrainer,
    build_group_trainer,
    search_context,
)
from lag_megatron.training.stage_monitor import StageMonitor
from lag_megatron.training.training_context import TrainingContext
from lag_megatron.training.wandb_event import show_event


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run has come: its stage, and its newest state (None: nothing trained yet)."""

    stage: int
    checkpoint: Path | None

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return step_of(self.checkpoint.name) if self.checkpoint else 0


class Trainer:
    """Trains a run from its newest state to its end; every rank has one."""

    def __init__(self, context: TrainingContext, world: World, recorder: Recorder) -> None:
        self.world, self.recorder = world, recorder
        self._engine: Engine | None = None
        self._set_context(context)

    def run(self) -> None:
        """Train all stages.

        Raises:
            Stopped: when asked to stop; everything needed to go on is saved.
            LagError: for a mistake of the user or the machine.
        """
        position = self.world.run_on_rank0(self._find_position)
        self.world.run_on_rank0(lambda: self._resume_metrics(position))
        for stage in range(position.stage, len(self.config.stages)):
            if stage > position.stage:
                position = Position(stage, self._next_start(stage))
            self._train_stage(position)
        loss = self.world.run_on_rank0(self._monitor.last_validation_loss)
        self.recorder.log_event(
            "run_finished", once={}, step=self.config.total_steps, val_loss=loss
        )

    def _set_context(self, context: TrainingContext) -> None:
        self.context, self.config = context, context.config
        self._ranges = stage_ranges(self.config.stages)
        self._monitor = StageMonitor(context, self.world, self.recorder)

    # Resuming

    def _find_position(self) -> Position:
        """The newest committed state (coordinator only)."""
        run, journal = self.context.run, self.recorder.logs.journal
        self._refuse_lost_checkpoint()
        for stage in reversed(range(len(self.config.stages))):
            if tags := manifest.committed_tags(run.stage(stage)):
                manifest.check_sizes(tags[-1])
                self._saved(tags[-1], stage, step_of(tags[-1].name))  # a kill may have come between
                return Position(stage, tags[-1])
            decision = journal.find("decision", growth=stage)
            if decision is not None:
                state = run.root / decision["state"]
                manifest.check_sizes(state)
                if not self.config.growth_before(stage).exhaustive:
                    drop_losers(run, stage, winner=state)  # a kill may have come between
                return Position(stage, state)
        return Position(0, None)

    def _refuse_lost_checkpoint(self) -> None:
        """Refuse to start again from an older state because the newest one is gone."""
        newest = self.recorder.logs.journal.find("checkpoint")
        if newest is None:
            return
        path = self.context.run.root / newest["path"]
        if not manifest.is_committed(path):
            raise CheckpointError(
                f"{path}: the journal says that this checkpoint was saved, but it is "
                "not there, or not whole. Restore it, or name an older one with --resume TAG."
            )

    def _resume_metrics(self, position: Position) -> None:
        """Drop metrics after the position, and print where the run goes on (coordinator only)."""
        nothing_yet = position.checkpoint is None
        self.recorder.logs.metrics.drop_after(-1 if nothing_yet else position.step)
        if position.checkpoint is None:
            self.recorder.print("fresh start: no checkpoint in the run directory")
            return
        tokens = position.step * tokens_per_step(self.config)
        before = ZeroCheckpoint.open(position.checkpoint).topology
        now = topology_of(self.config, self.world)
        if before != now:
            self.recorder.print(f"spreading the state anew: {before} before, {now} now")
        self.recorder.print(
            f"resumed from {self.context.run.relative(position.checkpoint)}: "
            f"stage {position.stage}, step {position.step}, {tokens:,} tokens"
        )

    def _next_start(self, stage: int) -> Path:
        """The state from which a stage starts when the one before has ended."""
        base = self.context.run.stage(stage - 1) / tag_of(self._ranges[stage].start)
        if not self.config.has_event(stage):
            return base
        event = self._event(stage, base)
        state = self._search(event)
        self._reload_config()
        self.world.run_on_rank0(
            lambda: show_event(self.recorder.logs.wandb, self.context.run, event)
        )
        return state

    def _search(self, event: GrowthEvent) -> Path:
        """The winner's state; groups of a part of the ranks have engines of their own."""
        context, world = self.context, self.world
        shape = {"vocab_size": context.vocab_size, "tensor": world.tensor_size}
        on_rank = partial(state_bytes, self.config, event, **shape)
        count = count_groups(world, event, state_bytes=on_rank)
        given = search_context(context, event)
        if count == 1:
            engine = self._engine_of(event.number, None)
            trainer = DeepSpeedProbeTrainer(context, engine, event.number)
            return search(world, ProbeWorker(given, trainer, event, count=1), self.recorder)
        self._drop_engine()
        with probe_group(
            given,
            world,
            event,
            count,
            build_trainer=partial(build_group_trainer, context, event),
            timeout=self.config.parallel.timeout,
        ) as worker:
            return search(world, worker, self.recorder)

    # Training a stage

    def _train_stage(self, position: Position) -> None:
        stage, end = position.stage, self._ranges[position.stage].stop
        self.recorder.log_event(
            "stage_started",
            once={"stage": stage},
            step=position.step,
            num_layers=self.config.layers_of(stage),
        )
        if position.checkpoint != self._tag(stage, end):
            engine = self._engine_of(stage, position.checkpoint)
            origin = position.checkpoint or self.config.checkpoint.initial
            history = self.world.run_on_rank0(
                lambda: [] if origin is None else growth_history(Path(origin))
            )
            if position.step == 0:
                self._monitor.validate(engine, 0, stage)
            for step in range(position.step, end):
                if self._train_step(engine, step, stage, history):
                    break
            end = self._ranges[stage].stop
            # Where the lag is as long as the stage, its end is the winner's probe state.
            self._save(engine, stage, end, history)
        loss = self.world.run_on_rank0(self._monitor.last_validation_loss)
        facts: dict[str, Any] = {"val_loss": loss}
        if sources := self.context.loader.tokens_by_source(end):
            facts["tokens_by_source"] = sources
        self.recorder.log_event("stage_finished", once={"stage": stage}, step=end, **facts)

    def _train_step(self, engine: Engine, step: int, stage: int, history: list[Any]) -> bool:
        """Take a step; whether it was the stage's last."""
        row, stop = self.context.step(engine, step, stage=stage)
        self._monitor.refuse_divergence(row)
        self._monitor.record_step(row)
        done = step + 1
        last = done == self._ranges[stage].stop
        if last or done % self.config.tracking.validation_interval == 0:
            self._monitor.validate(engine, done, stage)
            last = last or self._ends_stage(stage, done)
        if last or stop or done % self.config.checkpoint.interval == 0:
            self._save(engine, stage, done, history)
        if stop:
            raise Stopped(self.context.stop.why)
        return last

    def _ends_stage(self, stage: int, step: int) -> bool:
        """Whether the measured slope ends the stage here, which is then journalled."""
        slope = self._monitor.slope_that_ends(stage)
        if slope is None:
            return False
        event = {"stage": stage, "step": step, "steps": step - self._ranges[stage].start}
        self.recorder.log_event("stage_cut", once=event, slope=slope)
        self.recorder.print(
            f"stage {stage}  step {step:>6}: slope {slope:.4f}, the stage ends here"
        )
        self._reload_config()
        return True

    def _reload_config(self) -> None:
        """Apply what the journal records about the stages: their lengths and the winners' paths."""
        config = self.world.run_on_rank0(
            lambda: as_journalled(self.config, self.recorder.logs.journal.events)
        )
        self._set_context(replace(self.context, config=config))

    def _engine_of(self, stage: int, checkpoint: Path | None) -> Engine:
        """An engine of this stage's depth that holds the state ``checkpoint``."""
        layers, initial = self.config.layers_of(stage), self.config.checkpoint.initial
        if self._engine is not None and self._engine.num_layers != layers:
            self._drop_engine()
        if self._engine is None:
            self._engine = Engine(
                self.config,
                self.world,
                num_layers=layers,
                vocab_size=self.context.vocab_size,
                draw_weights=stage == 0 and checkpoint is None and initial is None,
            )
        if checkpoint is not None:
            self._engine.load(checkpoint)
        elif stage == 0 and initial is not None:
            note = start_from(self._engine, Path(initial), vocab_size=self.context.vocab_size)
            self.recorder.print(f"weights from {initial}: {note}")
        return self._engine

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None

    def _save(self, engine: Engine, stage: int, step: int, history: list[Any]) -> None:
        """Commit a checkpoint, unless this step's is there already."""
        path = self._tag(stage, step)
        self.recorder.flush_metrics()
        tokens = step * tokens_per_step(self.config)
        save_engine(engine, path, step=step, tokens=tokens, history=history)
        self.world.run_on_rank0(lambda: self._saved(path, stage, step))

    def _saved(self, path: Path, stage: int, step: int) -> None:
        manifest.point_latest(path)
        relative = self.context.run.relative(path)
        self.recorder.log_event("checkpoint", once={"path": relative}, stage=stage, step=step)
        for old in manifest.committed_tags(path.parent)[: -self.config.checkpoint.keep_last]:
            manifest.remove_checkpoint(old)

    # Growing

    def _event(self, stage: int, base: Path) -> GrowthEvent:
        growth = self.config.growth_before(stage)
        source, target = self.config.layers_of(stage - 1), self.config.layers_of(stage)
        return GrowthEvent(
            number=stage,
            base=base,
            base_step=self._ranges[stage].start,
            base_val_loss=self.world.run_on_rank0(self._monitor.last_validation_loss),
            source_layers=source,
            target_layers=target,
            stage_steps=len(self._ranges[stage]),
            growth=growth,
            pool=growth_pool(self.config, stage),
        )

    def _tag(self, stage: int, step: int) -> Path:
        return self.context.run.stage(stage) / tag_of(step)
