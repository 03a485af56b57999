"""The stage loop: train, grow, probe, decide, go on, and survive anything in between."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config.stage_schedule import stage_ranges
from lag_megatron.distributed.world import World, topology_of
from lag_megatron.engine.engine import Engine
from lag_megatron.engine.save import save_engine
from lag_megatron.engine.training_context import Job
from lag_megatron.errors import CheckpointError
from lag_megatron.growth.pool import build_pool
from lag_megatron.planning.cost import as_journalled, tokens_per_step
from lag_megatron.run.directory import step_of, tag_of
from lag_megatron.run.recorder import Recorder
from lag_megatron.run.signals import Stopped
from lag_megatron.search.decision import drop_losers
from lag_megatron.search.event import Event
from lag_megatron.search.partition import count_groups, part_of
from lag_megatron.search.search import search
from lag_megatron.search.worker import ProbeGroup
from lag_megatron.training.init_from import growth_history, start_from
from lag_megatron.training.stage_monitor import Meter
from lag_megatron.training.wandb_event import show_event


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: in which stage, at which state (None: nothing trained yet)."""

    stage: int
    checkpoint: Path | None

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return step_of(self.checkpoint.name) if self.checkpoint else 0


class Trainer:
    """Takes a run from wherever it stands to its end; every rank has one."""

    def __init__(self, job: Job, world: World, recorder: Recorder) -> None:
        self.world, self.recorder = world, recorder
        self._engine: Engine | None = None
        self._take(job)

    def run(self) -> None:
        """Train all stages.

        Raises:
            Stopped: when asked to stop; everything needed to go on is saved.
            LagError: for a mistake of the user or the machine.
        """
        position = self.world.from_coordinator(self._find_position)
        self.world.from_coordinator(lambda: self._resume_metrics(position))
        for stage in range(position.stage, len(self.config.stages)):
            if stage > position.stage:
                position = Position(stage, self._next_start(stage))
            self._train_stage(position)
        loss = self.world.from_coordinator(self._meter.last_validation_loss)
        self.recorder.happened("run_finished", once={}, step=self.config.total_steps, val_loss=loss)

    def _take(self, job: Job) -> None:
        self.job, self.config = job, job.config
        self._ranges = stage_ranges(self.config.stages)
        self._meter = Meter(job, self.world, self.recorder)

    # Finding the place

    def _find_position(self) -> Position:
        """The newest committed state (coordinator only)."""
        run, journal = self.job.run, self.recorder.books.journal
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
        """A run that silently began anew because its newest state is gone would lie."""
        newest = self.recorder.books.journal.find("checkpoint")
        if newest is not None and not manifest.is_committed(self.job.run.root / newest["path"]):
            raise CheckpointError(
                f"{self.job.run.root / newest['path']}: the journal says that this checkpoint was "
                "saved, but it is not there, or not whole. Restore it, or name an older one with "
                "--resume TAG."
            )

    def _resume_metrics(self, position: Position) -> None:
        """Forget what comes after the position, and say where the run goes on (coordinator)."""
        nothing_yet = position.checkpoint is None
        self.recorder.books.metrics.drop_after(-1 if nothing_yet else position.step)
        if position.checkpoint is None:
            self.recorder.say("fresh start: no checkpoint in the run directory")
            return
        tokens = position.step * tokens_per_step(self.config)
        before = ZeroCheckpoint.open(position.checkpoint).topology
        now = topology_of(self.config, self.world)
        if before != now:
            self.recorder.say(f"spreading the state anew: {before} before, {now} now")
        self.recorder.say(
            f"resumed from {self.job.run.relative(position.checkpoint)}: stage {position.stage}, "
            f"step {position.step}, {tokens:,} tokens"
        )

    def _next_start(self, stage: int) -> Path:
        """The state from which a stage starts when the one before has ended."""
        base = self.job.run.stage(stage - 1) / tag_of(self._ranges[stage].start)
        if not self.config.has_event(stage):
            return base
        event = self._event(stage, base)
        state = self._search(event)
        self._take_findings()
        self.world.from_coordinator(
            lambda: show_event(self.recorder.books.wandb, self.job.run, event)
        )
        return state

    def _search(self, event: Event) -> Path:
        """The winner's state; groups of a part of the ranks have engines of their own."""
        count = count_groups(self.job, self.world, event)
        if count == 1:
            group = ProbeGroup(self.job, self._engine_of(event.number, None), event, count=1)
            return search(self.world, group, self.recorder)
        self._drop_engine()
        with part_of(self.job, self.world, event, count) as group:
            return search(self.world, group, self.recorder)

    # Training a stage

    def _train_stage(self, position: Position) -> None:
        stage, end = position.stage, self._ranges[position.stage].stop
        self.recorder.happened(
            "stage_started",
            once={"stage": stage},
            step=position.step,
            num_layers=self.config.layers_of(stage),
        )
        if position.checkpoint != self._tag(stage, end):
            engine = self._engine_of(stage, position.checkpoint)
            origin = position.checkpoint or self.config.checkpoint.initial
            history = self.world.from_coordinator(
                lambda: [] if origin is None else growth_history(Path(origin))
            )
            if position.step == 0:
                self._meter.validate(engine, 0, stage)
            for step in range(position.step, end):
                if self._train_step(engine, step, stage, history):
                    break
            end = self._ranges[stage].stop
            # Where the lag is as long as the stage, its end is the winner's probe state.
            self._save(engine, stage, end, history)
        loss = self.world.from_coordinator(self._meter.last_validation_loss)
        facts: dict[str, Any] = {"val_loss": loss}
        if sources := self.job.feed.tokens_by_source(end):
            facts["tokens_by_source"] = sources
        self.recorder.happened("stage_finished", once={"stage": stage}, step=end, **facts)

    def _train_step(self, engine: Engine, step: int, stage: int, history: list[Any]) -> bool:
        """Take a step, and say whether it was the stage's last."""
        row, stop = self.job.step(engine, step, stage=stage)
        self._meter.refuse_divergence(row)
        self._meter.note(row)
        done = step + 1
        last = done == self._ranges[stage].stop
        if last or done % self.config.tracking.validation_interval == 0:
            self._meter.validate(engine, done, stage)
            last = last or self._ends_here(stage, done)
        if last or stop or done % self.config.checkpoint.interval == 0:
            self._save(engine, stage, done, history)
        if stop:
            raise Stopped(self.job.stop.why)
        return last

    def _ends_here(self, stage: int, step: int) -> bool:
        """Whether the measured slope ends the stage, which is then written down for good."""
        slope = self._meter.flattened(stage)
        if slope is None:
            return False
        event = {"stage": stage, "step": step, "steps": step - self._ranges[stage].start}
        self.recorder.happened("stage_cut", once=event, slope=slope)
        self.recorder.say(f"stage {stage}  step {step:>6}: slope {slope:.4f}, the stage ends here")
        self._take_findings()
        return True

    def _take_findings(self) -> None:
        """Go on by what the journal says that the run found out."""
        config = self.world.from_coordinator(
            lambda: as_journalled(self.config, self.recorder.books.journal.events)
        )
        self._take(replace(self.job, config=config))

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
                vocab_size=self.job.vocab_size,
                draw_weights=stage == 0 and checkpoint is None and initial is None,
            )
        if checkpoint is not None:
            self._engine.load(checkpoint)
        elif stage == 0 and initial is not None:
            told = start_from(self._engine, Path(initial), vocab_size=self.job.vocab_size)
            self.recorder.say(f"weights from {initial}: {told}")
        return self._engine

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None

    def _save(self, engine: Engine, stage: int, step: int, history: list[Any]) -> None:
        """Commit a checkpoint, unless this step's is there already."""
        path = self._tag(stage, step)
        self.recorder.about_to_save()
        tokens = step * tokens_per_step(self.config)
        save_engine(engine, path, step=step, tokens=tokens, history=history)
        self.world.from_coordinator(lambda: self._saved(path, stage, step))

    def _saved(self, path: Path, stage: int, step: int) -> None:
        manifest.point_latest(path)
        relative = self.job.run.relative(path)
        self.recorder.happened("checkpoint", once={"path": relative}, stage=stage, step=step)
        for old in manifest.committed_tags(path.parent)[: -self.config.checkpoint.keep_last]:
            manifest.remove_checkpoint(old)

    # Growing

    def _event(self, stage: int, base: Path) -> Event:
        growth = self.config.growth_before(stage)
        source, target = self.config.layers_of(stage - 1), self.config.layers_of(stage)
        pool = build_pool(
            growth,
            source_layers=source,
            target_layers=target,
            seed=self.config.seed,
            init_std=self.config.model.init_std,
        )
        return Event(
            number=stage,
            base=base,
            base_step=self._ranges[stage].start,
            base_val_loss=self.world.from_coordinator(self._meter.last_validation_loss),
            source_layers=source,
            target_layers=target,
            stage_steps=len(self._ranges[stage]),
            growth=growth,
            pool=pool,
        )

    def _tag(self, stage: int, step: int) -> Path:
        return self.job.run.stage(stage) / tag_of(step)
