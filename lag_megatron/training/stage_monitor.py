"""Metrics of a stage: recorded, checked for divergence, and for a slope that ends the stage."""

import math
from dataclasses import dataclass

from lag_megatron.config.schema.stage_schedule import stage_ranges, start_positions
from lag_megatron.distributed.world import World
from lag_megatron.engine.engine import Engine
from lag_megatron.engine.step_result import mean
from lag_megatron.errors import RunError
from lag_megatron.planning.cost import steps_flops, tokens_per_step
from lag_megatron.planning.staged_training.slope import has_flattened, slopes
from lag_megatron.run.metrics import MetricRow, validation_row
from lag_megatron.run.recorder import Recorder
from lag_megatron.training.training_context import TrainingContext

# Validations over which the slope is measured: Shen et al. 2022 take the mean over 5 points.
SLOPE_WINDOW = 5


@dataclass(frozen=True, slots=True)
class StageMonitor:
    """Records the steps and validations of a run's stages, and checks them; every rank has one."""

    context: TrainingContext
    world: World
    recorder: Recorder

    def refuse_divergence(self, row: MetricRow) -> None:
        """Check a step before anything of it is recorded or saved.

        With a gradient that is not finite DeepSpeed skips the step under ZeRO and spoils the
        weights without ZeRO; in both cases the run would go on without an error.

        Raises:
            RunError: on every rank, for a loss or gradient that is not finite.
        """
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(float(row.get(name, 0.0))):
                raise _error_on_all_ranks(
                    f"{name} is {row[name]} at step {row['step']}; nothing of this step was saved. "
                    "Go on from an older checkpoint with --resume TAG, or start another --run-dir "
                    "with a lower optimizer.lr or a stronger optimizer.grad_clip."
                )

    def record_step(self, row: MetricRow) -> None:
        """Record a training step, and print it now and then."""
        self.recorder.log_metrics(row)
        step, config = int(row["step"]), self.context.config
        if self.world.is_coordinator and (step % config.tracking.log_interval == 0 or step == 1):
            console = self.recorder.logs.console
            console.step(row, total_steps=config.total_steps, mfu=self._mfu(row))

    def validate(self, engine: Engine, step: int, stage: int) -> None:
        """Evaluate and record.

        Raises:
            RunError: on every rank, for a loss that is not finite.
        """
        loss = mean(self.context.evaluate(engine))
        if not math.isfinite(loss):
            raise _error_on_all_ranks(
                f"validation loss is {loss} at step {step}; the step was not saved."
            )
        tokens = step * tokens_per_step(self.context.config)
        self.recorder.log_metrics(validation_row(step, tokens=tokens, stage=stage, loss=loss))
        self.recorder.print(
            f"stage {stage}  step {step:>6}/{self.context.config.total_steps}  val loss {loss:.4f}"
        )

    def last_validation_loss(self) -> float:
        """In nats per token, from the metrics (coordinator only)."""
        return self.recorder.logs.metrics.last("val/loss")

    def slope_that_ends(self, stage: int) -> float | None:
        """The slope d log loss / d log compute, if it has reached the stage's ``until_slope``.

        The same on all ranks.  Compute is proportional to the position in the schedule: what a
        model of this size would have taken to come here.
        """
        tau = self.context.config.stages[stage].until_slope
        if tau is None:
            return None
        return self.world.run_on_rank0(lambda: self._measured_slope(stage, tau))

    def _measured_slope(self, stage: int, tau: float) -> float | None:
        config = self.context.config
        before = start_positions(config)[stage] - stage_ranges(config.stages)[stage].start
        points = [
            (float(row["step"] + before), float(row["val/loss"]))
            for row in self.recorder.logs.metrics.rows()
            if row["stage"] == stage and "val/loss" in row
        ]
        if not has_flattened(points, tau=tau, window=SLOPE_WINDOW):
            return None
        return slopes(points, SLOPE_WINDOW)[-1]

    def _mfu(self, row: MetricRow) -> float | None:
        """Model FLOPs utilisation of all GPUs; None on devices whose peak is not known."""
        peak, config = self.world.peak_flops, self.context.config
        if peak is None or config.parallel.precision != "bf16":
            return None
        step = int(row["step"]) - 1
        flops = steps_flops(config, range(step, step + 1), vocab_size=self.context.vocab_size)
        seconds = tokens_per_step(config) / float(row["train/tokens_per_second"])
        return flops / seconds / (peak * self.world.size)


def _error_on_all_ranks(message: str) -> RunError:
    """An error that every rank finds, because all see the same numbers."""
    error = RunError(message)
    error.on_all_ranks = True
    return error
