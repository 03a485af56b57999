"""What a stage measures about itself, and when that ends it."""

import math
from dataclasses import dataclass

from lag_megatron.config.stage_schedule import stage_ranges, start_positions
from lag_megatron.distributed.world import World
from lag_megatron.engine.engine import Engine
from lag_megatron.engine.step_result import mean
from lag_megatron.engine.training_context import Job, MetricRow
from lag_megatron.errors import RunError
from lag_megatron.planning.cost import steps_flops, tokens_per_step
from lag_megatron.planning.staged_training.slope import has_flattened, slopes
from lag_megatron.run.recorder import Recorder

# Validations over which the slope is measured: Shen et al. 2022 take the mean over 5 points.
SLOPE_WINDOW = 5


@dataclass(frozen=True, slots=True)
class Meter:
    """Records the steps and validations of a run's stages."""

    job: Job
    world: World
    recorder: Recorder

    def refuse_divergence(self, row: MetricRow) -> None:
        """Before anything of this step is recorded or saved.

        DeepSpeed takes no step on a gradient that is not finite under ZeRO, and a poisonous one
        without; either way the run would go on and say that all is well.

        Raises:
            RunError: on every rank, for a loss or gradient that is not finite.
        """
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(float(row.get(name, 0.0))):
                raise _agreed(
                    f"{name} is {row[name]} at step {row['step']}; nothing of this step was saved. "
                    "Go on from an older checkpoint with --resume TAG, or start another --run-dir "
                    "with a lower optimizer.lr or a stronger optimizer.grad_clip."
                )

    def note(self, row: MetricRow) -> None:
        """Record a training step, and print it now and then."""
        self.recorder.measured(row)
        step, config = int(row["step"]), self.job.config
        if self.world.is_coordinator and (step % config.tracking.log_interval == 0 or step == 1):
            console = self.recorder.books.console
            console.step(row, total_steps=config.total_steps, mfu=self._mfu(row))

    def validate(self, engine: Engine, step: int, stage: int) -> None:
        """Evaluate and record.

        Raises:
            RunError: on every rank, for a loss that is not finite.
        """
        loss = mean(self.job.evaluate(engine))
        if not math.isfinite(loss):
            raise _agreed(f"validation loss is {loss} at step {step}; the step was not saved.")
        self.recorder.measured(self.job.validation_row(step, stage=stage, loss=loss))
        self.recorder.say(
            f"stage {stage}  step {step:>6}/{self.job.config.total_steps}  val loss {loss:.4f}"
        )

    def last_validation_loss(self) -> float:
        """From the metrics (coordinator only)."""
        return self.recorder.books.metrics.last("val/loss")

    def flattened(self, stage: int) -> float | None:
        """The slope d log loss / d log compute, where it has reached the stage's ``until_slope``.

        The same on all ranks.  Compute is proportional to the position in the schedule: what a
        model of this size would have taken to come here.
        """
        tau = self.job.config.stages[stage].until_slope
        if tau is None:
            return None
        return self.world.run_on_rank0(lambda: self._flattened(stage, tau))

    def _flattened(self, stage: int, tau: float) -> float | None:
        config = self.job.config
        before = start_positions(config)[stage] - stage_ranges(config.stages)[stage].start
        points = [
            (float(row["step"] + before), float(row["val/loss"]))
            for row in self.recorder.books.metrics.rows()
            if row["stage"] == stage and "val/loss" in row
        ]
        if not has_flattened(points, tau=tau, window=SLOPE_WINDOW):
            return None
        return slopes(points, SLOPE_WINDOW)[-1]

    def _mfu(self, row: MetricRow) -> float | None:
        """Model FLOPs utilisation of all GPUs; None on devices whose peak is not known."""
        peak, config = self.world.peak_flops, self.job.config
        if peak is None or config.parallel.precision != "bf16":
            return None
        step = int(row["step"]) - 1
        flops = steps_flops(config, range(step, step + 1), vocab_size=self.job.vocab_size)
        seconds = tokens_per_step(config) / float(row["train/tokens_per_second"])
        return flops / seconds / (peak * self.world.size)


def _agreed(message: str) -> RunError:
    """An error that every rank finds, because all see the same numbers."""
    error = RunError(message)
    error.on_all_ranks = True
    return error
