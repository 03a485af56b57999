"""One optimizer step and one evaluation, the same in a stage and in a probe."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from lag_megatron.config import RunConfig
from lag_megatron.config.schema.raptr import Lengths
from lag_megatron.data import BatchLoader
from lag_megatron.engine.engine import Engine
from lag_megatron.planning.cost import tokens_per_step
from lag_megatron.planning.lr_schedule import rate_at
from lag_megatron.planning.random_paths import path_at, with_path_length
from lag_megatron.run.directory import RunDirectory
from lag_megatron.run.metrics import MetricRow
from lag_megatron.run.signals import StopFlag


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """What each step of a run needs, the same on all ranks but for the batches.

    Attributes:
        config: of the run.
        run: directory of its files.
        loader: this rank's batches.
        stop: set when the run is asked to end.
        vocab_size: rows of the vocabulary, padding included.
        require_sound_data: raises ``DataError`` on the rank that found its data to be changed.
    """

    config: RunConfig
    run: RunDirectory
    loader: BatchLoader
    stop: StopFlag
    vocab_size: int
    require_sound_data: Callable[[], object] = lambda: None

    def step(self, engine: Engine, step: int, *, stage: int) -> tuple[MetricRow, bool]:
        """Take one optimizer step.

        Args:
            engine: every rank calls with its own.
            step: 0-based number of the step in the whole run.
            stage: that it belongs to.

        Returns:
            the step's metrics, whose ``step`` counts the steps taken and so is one more; and
            whether some rank was asked to stop, the same on all ranks.

        Raises:
            DataError: on all ranks, if the data of one was found to be changed.
        """
        config = self.config
        started = time.perf_counter()
        rate, path = rate_at(step, config), path_at(step, config)
        result = engine.train_step(
            self.loader.micro_batches(step),
            step=step,
            lr=rate.lr,
            new_layers=rate.new_layers,
            path=path,
            stop_asked=lambda: self.stop.asked,
        )
        if result.stop_asked:  # before what was trained on is saved
            engine.world.run_on_all_ranks(self.require_sound_data)
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

    def with_paths(self, stage: int, length: Lengths | None) -> "TrainingContext":
        """This context with a candidate's path length in a stage; None leaves it as it is."""
        return replace(self, config=with_path_length(self.config, stage, length))

    def evaluate(self, engine: Engine) -> list[float]:
        """Mean loss of each batch of the fixed validation set, in nats per label."""
        return engine.evaluate(self.loader.validation())
