"""One optimizer step and one evaluation, the same in a stage and in a probe."""

import time
from dataclasses import dataclass, replace

from lag_megatron.config import RunConfig
from lag_megatron.config.schema.raptr import Lengths
from lag_megatron.data import BatchLoader
from lag_megatron.engine.engine import Engine
from lag_megatron.planning.cost import tokens_per_step
from lag_megatron.planning.lr_schedule import rate_at
from lag_megatron.planning.random_paths import path_at, with_path_length
from lag_megatron.run.directory import RunDirectory
from lag_megatron.run.signals import StopFlag

MetricRow = dict[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Job:
    """What every part of a run needs: settings, text, paths and the flag to stop."""

    config: RunConfig
    run: RunDirectory
    feed: BatchLoader
    stop: StopFlag
    vocab_size: int

    def step(self, engine: Engine, step: int, *, stage: int) -> tuple[MetricRow, bool]:
        """Take optimizer step ``step`` (0-based) and return its metrics and whether to stop.

        The row's ``step`` counts the steps taken, so it is one more.
        """
        config = self.config
        started = time.perf_counter()
        rate, path = rate_at(step, config), path_at(step, config)
        result = engine.train_step(
            self.feed.micro_batches(step),
            step=step,
            lr=rate.lr,
            new_layers=rate.new_layers,
            path=path,
            stop_asked=lambda: self.stop.asked,
        )
        tokens = tokens_per_step(config)
        row: MetricRow = {
            "step": step + 1,
            "tokens": (step + 1) * tokens,
            "stage": stage,
            "train/loss": result.loss,
            "train/lr": rate.lr,
            "train/tokens_per_second": tokens / (time.perf_counter() - started),
        }
        if rate.new_layers < 1.0:
            row["train/lr_new_layers"] = rate.lr * rate.new_layers
        if config.has_paths:
            row["train/layers"] = len(path.layers) if path else config.layers_of(stage)
        if result.grad_norm is not None:
            row["train/grad_norm"] = result.grad_norm
        return row, result.stop_asked

    def with_paths(self, stage: int, length: Lengths | None) -> "Job":
        """This job, with a stage's paths as a candidate has them; None is as they are."""
        return replace(self, config=with_path_length(self.config, stage, length))

    def evaluate(self, engine: Engine) -> list[float]:
        """Loss of each batch of the fixed validation set."""
        return engine.evaluate(self.feed.validation())

    def validation_row(self, step: int, *, stage: int, loss: float) -> MetricRow:
        """The metrics line of an evaluation after ``step`` steps."""
        tokens = step * tokens_per_step(self.config)
        return {"step": step, "tokens": tokens, "stage": stage, "val/loss": loss}
