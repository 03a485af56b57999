"""The stage loop: train, grow, probe, decide, go on, and survive anything in between."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint import commit
from lag_megatron.config import RunConfig
from lag_megatron.engine import Engine, mean
from lag_megatron.errors import CheckpointError, RunError
from lag_megatron.growth.layer_map import draw
from lag_megatron.growth.pool import build_pool
from lag_megatron.parallel import World
from lag_megatron.probe.coordinator import Coordinator
from lag_megatron.probe.journal import Journal
from lag_megatron.probe.probe import Event, history_of, run_probe
from lag_megatron.probe.saving import save_engine
from lag_megatron.probe.steps import Job, MetricRow
from lag_megatron.rundir import step_of, tag_of
from lag_megatron.schedule import stage_ranges, tokens_per_step, training_flops_per_token
from lag_megatron.stopping import Stopped
from lag_megatron.tracking import Console, MetricsLog, Wandb


@dataclass(frozen=True, slots=True)
class Recorder:
    """What the coordinator writes with; the other ranks have none."""

    journal: Journal
    metrics: MetricsLog
    wandb: Wandb
    console: Console


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

    def __init__(
        self, job: Job, world: World, recorder: Recorder | None, *, resume: str = "auto"
    ) -> None:
        self.job, self.world, self.recorder, self._resume = job, world, recorder, resume
        self.config: RunConfig = job.config
        self._ranges = stage_ranges(self.config.stages)
        self._engine: Engine | None = None

    def run(self) -> None:
        """Train all stages.

        Raises:
            Stopped: when asked to stop; everything needed to go on is saved.
            LagError: for a mistake of the user or the machine.
        """
        position = self.world.from_coordinator(self._find_position)
        self._resume_metrics(position)
        for stage in range(position.stage, len(self.config.stages)):
            if stage > position.stage:
                position = Position(stage, self._next_start(stage))
            self._train_stage(position)
        final = self._last_validation_loss()
        self._journal("run_finished", step=self.config.total_steps, val_loss=final)

    # Finding the place

    def _find_position(self) -> Position:
        """The newest committed state, or the one asked for (coordinator only)."""
        run, recorder = self.job.run, self._recorder
        if self._resume not in ("auto", "never"):
            return self._find_tag(self._resume)
        self._refuse_lost_checkpoint()
        for stage in reversed(range(len(self.config.stages))):
            if tags := commit.committed(run.stage(stage)):
                commit.check_sizes(tags[-1])
                return Position(stage, tags[-1])
            decision = recorder.journal.find("decision", growth=stage)
            if decision is not None:
                return Position(stage, run.root / decision["state"])
        return Position(0, None)

    def _refuse_lost_checkpoint(self) -> None:
        """A run that silently began anew because its newest state is gone would lie."""
        newest = self._recorder.journal.find("checkpoint")
        if newest is not None and not commit.is_committed(self.job.run.root / newest["path"]):
            raise CheckpointError(
                f"{self.job.run.root / newest['path']}: the journal says that this checkpoint was "
                "saved, but it is not there, or not whole. Restore it, or name an older one with "
                "--resume TAG."
            )

    def _find_tag(self, tag: str) -> Position:
        there: list[str] = []
        for stage in range(len(self.config.stages)):
            for path in commit.committed(self.job.run.stage(stage)):
                if path.name == tag:
                    commit.check_sizes(path)
                    return Position(stage, path)
                there.append(path.name)
        raise RunError(
            f"--resume {tag}: no such committed checkpoint in {self.job.run.root}. "
            f"There are: {', '.join(there) or 'none'}."
        )

    def _resume_metrics(self, position: Position) -> None:
        if self.recorder is None:
            return
        self.recorder.metrics.drop_after(position.step)
        if position.checkpoint is None:
            self._say("fresh start: no checkpoint in the run directory")
            return
        tokens = position.step * tokens_per_step(self.config)
        self._say(
            f"resumed from {self.job.run.relative(position.checkpoint)}: stage {position.stage}, "
            f"step {position.step}, {tokens:,} tokens"
        )

    def _next_start(self, stage: int) -> Path:
        """The state from which a stage starts when the one before has ended."""
        base = self.job.run.stage(stage - 1) / tag_of(self._ranges[stage].start)
        if self.config.layers_of(stage) == self.config.layers_of(stage - 1):
            return base
        return self._grow(stage, base)

    # Training a stage

    def _train_stage(self, position: Position) -> None:
        stage, end = position.stage, self._ranges[position.stage].stop
        engine = self._engine_of(stage, position.checkpoint)
        if self.recorder and self.recorder.journal.find("stage_started", stage=stage) is None:
            layers = self.config.layers_of(stage)
            self._journal("stage_started", stage=stage, step=position.step, num_layers=layers)
        if position.step == 0:
            self._validate(engine, 0, stage)
        history = history_of(position.checkpoint) if position.checkpoint else []
        saved = position.step if position.checkpoint == self._tag(stage, position.step) else None
        for step in range(position.step, end):
            row, stop = self.job.step(engine, step, stage=stage)
            done = step + 1
            self._note(row)
            self._refuse_bad_loss(row)
            last = done == end
            if last or done % self.config.tracking.validation_interval == 0:
                self._validate(engine, done, stage)
            if last or stop or done % self.config.checkpoint.interval == 0:
                self._save(engine, stage, done, history)
                saved = done
            if stop and not last:
                raise Stopped(self.job.stop.why)
        if saved != end:
            # The lag was as long as the stage: its end is the winner's probe state.
            self._validate(engine, end, stage)
            self._save(engine, stage, end, history)
        self._finish_stage(stage, end)

    def _engine_of(self, stage: int, checkpoint: Path | None) -> Engine:
        """An engine of this stage's depth that holds the state ``checkpoint``."""
        layers = self.config.layers_of(stage)
        if self._engine is not None and self._engine.num_layers != layers:
            self._engine.destroy()
            self._engine = None
        if self._engine is None:
            self._engine = Engine(
                self.config, self.world, num_layers=layers, vocab_size=self.job.vocab_size
            )
        if checkpoint is not None:
            self._engine.load(checkpoint)
        return self._engine

    def _save(self, engine: Engine, stage: int, step: int, history: list[Any]) -> None:
        path = self._tag(stage, step)
        if self.recorder is not None:
            self.recorder.metrics.flush_to_disk()
        tokens = step * tokens_per_step(self.config)
        save_engine(engine, path, step=step, tokens=tokens, history=history)
        if self.recorder is not None:
            relative = self.job.run.relative(path)
            if self.recorder.journal.find("checkpoint", path=relative) is None:
                self._journal("checkpoint", stage=stage, step=step, path=relative)
            for old in commit.committed(path.parent)[: -self.config.checkpoint.keep_last]:
                commit.remove(old)

    def _finish_stage(self, stage: int, end: int) -> None:
        if self.recorder and self.recorder.journal.find("stage_finished", stage=stage) is None:
            loss = self._last_validation_loss()
            self._journal("stage_finished", stage=stage, step=end, val_loss=loss)

    def _refuse_bad_loss(self, row: MetricRow) -> None:
        loss = float(row["train/loss"])
        if loss != loss or loss == float("inf"):
            raise RunError(
                f"training loss is {loss} at step {row['step']}. The newest checkpoint is sound; "
                "run again with a lower optimizer.lr or stronger optimizer.grad_clip, in another "
                "--run-dir."
            )

    # Growing

    def _grow(self, stage: int, base: Path) -> Path:
        """Hold growth event ``stage`` and return the winner's state."""
        base_loss = self.world.from_coordinator(self._last_validation_loss)
        event = self._event(stage, base, base_loss)
        engine = self._engine_of(stage, None)
        coordinator = (
            Coordinator(self.job, self._recorder.journal, event) if self.recorder else None
        )
        self.world.from_coordinator(lambda: self._begin(coordinator, event, engine))
        while True:
            turn = self.world.from_coordinator(lambda: _present(coordinator).next_turn())
            if turn.index is None:
                break
            candidate = event.pool[turn.index]
            result = run_probe(self.job, engine, event, candidate, to_beat=turn.to_beat)
            outcome = result.failure or f"val loss {result.val_loss:.4f} after {result.steps} steps"
            self._say(
                f"probe {turn.index + 1:>2}/{len(event.pool)}  {candidate.id:<18} "
                f"[{draw(candidate.plan.layer_map)}]  {outcome}  ({result.seconds:.1f} s)"
            )
            self.world.from_coordinator(lambda t=turn, r=result: _record(coordinator, t.index, r))
        return self.world.from_coordinator(lambda: self._conclude(_present(coordinator)))

    def _event(self, stage: int, base: Path, base_loss: float) -> Event:
        growth = self.config.growth_before(stage)
        source, target = self.config.layers_of(stage - 1), self.config.layers_of(stage)
        pool = build_pool(
            growth,
            source_layers=source,
            target_layers=target,
            seed=self.config.seed,
            init_std=self.config.model.init_std,
        )
        step = self._ranges[stage].start
        return Event(stage, base, step, base_loss, source, target, growth, pool)

    def _begin(self, coordinator: Coordinator | None, event: Event, engine: Engine) -> None:
        commit.check_sizes(event.base)
        # At most: the best state so far, the grown one, and the one being saved.
        commit.require_space(
            self.job.run.root, needed=3 * engine.bytes_on_disk, what="probing candidates"
        )
        _present(coordinator).begin()
        self._say(
            f"growth {event.number}: {event.source_layers} -> {event.target_layers} layers, "
            f"{len(event.pool)} candidates, {event.growth.lag} steps each, "
            f"loss before {event.base_val_loss:.4f}"
        )

    def _conclude(self, coordinator: Coordinator) -> Path:
        decision, rows = coordinator.decide()
        self._recorder.metrics.append(*rows)
        state = coordinator.announce(decision)
        finished = [c for c in decision["candidates"] if c["status"] == "finished"]
        at_zero = min(finished, key=lambda c: c["curve"][0][1])
        chosen = next(c for c in finished if c["id"] == decision["chosen"])
        self._say(
            f"decision: {chosen['id']} has the lowest validation loss after {decision['lag']} "
            f"steps ({chosen['curve'][-1][1]:.4f}; spread over the pool "
            f"{_spread(finished):.4f}); LAG@0 would have chosen {at_zero['id']} "
            f"({at_zero['curve'][-1][1]:.4f})"
        )
        return state

    # Recording (coordinator only)

    @property
    def _recorder(self) -> Recorder:
        assert self.recorder is not None, "only the coordinator records"
        return self.recorder

    def _tag(self, stage: int, step: int) -> Path:
        return self.job.run.stage(stage) / tag_of(step)

    def _say(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.console.say(text)

    def _journal(self, event: str, **fields: Any) -> None:
        if self.recorder is not None:
            self.recorder.journal.append(event, **fields)

    def _note(self, row: MetricRow) -> None:
        if self.recorder is None:
            return
        self.recorder.metrics.append(row)
        self.recorder.wandb.log(row)
        step = int(row["step"])
        if step % self.config.tracking.log_interval == 0 or step == 1:
            self.recorder.console.step(row, total_steps=self.config.total_steps, mfu=self._mfu(row))

    def _mfu(self, row: MetricRow) -> float | None:
        """Model FLOPs utilisation of all GPUs; None on devices whose peak is not known."""
        peak = self.world.peak_flops
        if peak is None:
            return None
        flops = training_flops_per_token(
            self.config.model,
            num_layers=self.config.layers_of(int(row["stage"])),
            vocab_size=self.job.vocab_size,
        )
        return float(row["train/tokens_per_second"]) * flops / (peak * self.world.size)

    def _validate(self, engine: Engine, step: int, stage: int) -> None:
        loss = mean(self.job.evaluate(engine))
        if self.recorder is None:
            return
        row = self.job.validation_row(step, stage=stage, loss=loss)
        self.recorder.metrics.append(row)
        self.recorder.wandb.log(row)
        self._say(f"stage {stage}  step {step:>6}/{self.config.total_steps}  val loss {loss:.4f}")

    def _last_validation_loss(self) -> float:
        if self.recorder is None:
            return float("nan")
        return self.recorder.metrics.last("val/loss")


def _present(coordinator: Coordinator | None) -> Coordinator:
    assert coordinator is not None, "only the coordinator coordinates"
    return coordinator


def _record(coordinator: Coordinator | None, index: int | None, result: Any) -> None:
    assert index is not None
    _present(coordinator).record(index, result)


def _spread(candidates: list[dict[str, Any]]) -> float:
    losses = [c["curve"][-1][1] for c in candidates]
    return float(max(losses) - min(losses))
