"""The life of one candidate: grown from the base, trained to the lag, evaluated on the way."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint import commit
from lag_megatron.checkpoint.zero import ZeroCheckpoint
from lag_megatron.config import GrowthConfig
from lag_megatron.engine import Engine, mean
from lag_megatron.growth.materialize import Growth
from lag_megatron.growth.pool import Candidate
from lag_megatron.parallel import World
from lag_megatron.probe.saving import save_engine
from lag_megatron.probe.steps import Job, MetricRow
from lag_megatron.rundir import tag_of
from lag_megatron.schedule import tokens_per_step
from lag_megatron.stopping import Stopped

CURVE = "probe.jsonl"
TRAINING = "train.jsonl"


@dataclass(frozen=True, slots=True)
class Event:
    """A growth event: from which state, to which depth, judged how."""

    number: int
    base: Path
    base_step: int
    base_val_loss: float
    source_layers: int
    target_layers: int
    growth: GrowthConfig
    pool: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How a probe ended.

    Attributes:
        steps: optimizer steps taken after growth.
        val_loss: at the last evaluation, in nats per token.
        seconds: wall time, growth included.
        state: the saved state; None if the candidate could not win any more.
        failure: why it lost before the lag; empty if it did not.
    """

    steps: int
    val_loss: float
    seconds: float
    state: Path | None
    failure: str


def run_probe(
    job: Job, engine: Engine, event: Event, candidate: Candidate, *, to_beat: float
) -> ProbeResult:
    """Grow, train to the lag, evaluate, and save the state if it beats the best so far.

    Every rank calls this together.

    Raises:
        Stopped: when a signal asked for it; the probe starts again with the next run.
    """
    started = time.perf_counter()
    world = engine.world
    folder = job.run.probe(event.number, candidate.id)
    world.from_coordinator(lambda: _empty(folder))
    growth = _grow_in_place(engine, event.base, candidate)
    logs = _Logs(folder, world)
    steps, loss, failure = _train(job, engine, event, logs)
    state: Path | None = None
    if not failure and loss < to_beat:
        state = folder / tag_of(event.base_step + event.growth.lag)
        save_engine(
            engine,
            state,
            step=event.base_step + steps,
            tokens=(event.base_step + steps) * tokens_per_step(job.config),
            history=growth.client_state["growth_history"],
            growth=growth,
        )
    return ProbeResult(steps, loss, time.perf_counter() - started, state, failure)


def _grow_in_place(engine: Engine, base: Path, candidate: Candidate) -> Growth:
    opened: list[Growth] = []

    def open_base() -> None:
        opened.append(Growth(ZeroCheckpoint.open(base), candidate.plan, engine.topology))

    engine.world.from_each(open_base)  # a rank that failed alone would leave the others waiting
    engine.grow_from(opened[0])
    return opened[0]


def _empty(folder: Path) -> None:
    """Forget what a probe that was cut short left."""
    commit.remove(folder)
    folder.mkdir(parents=True)


def history_of(checkpoint: Path) -> list[Mapping[str, Any]]:
    """The growth plans that led to a checkpoint."""
    return list(ZeroCheckpoint.open(checkpoint).client_state.get("growth_history", []))


def _train(job: Job, engine: Engine, event: Event, logs: "_Logs") -> tuple[int, float, str]:
    """Steps taken, last validation loss and the reason of a failure."""
    growth = event.growth
    taken = 0
    loss = math.nan
    for rung in growth.evaluation_steps():
        while taken < rung:
            row, stop = job.step(engine, event.base_step + taken, stage=event.number)
            taken += 1
            if stop:
                raise Stopped(job.stop.why)
            failure = _failure(float(row["train/loss"]), growth, "training", taken)
            if not math.isfinite(float(row.get("train/grad_norm", 0.0))):
                failure = f"gradient norm is {row['train/grad_norm']} at step {taken}"
            if failure:
                return taken, loss, failure
            logs.trained(row)
        batches = job.evaluate(engine)
        loss = mean(batches)
        if failure := _failure(loss, growth, "validation", taken):
            return taken, loss, failure
        logs.evaluated(taken, loss, batches)
    return taken, loss, ""


def _failure(loss: float, growth: GrowthConfig, what: str, step: int) -> str:
    if not math.isfinite(loss):
        return f"{what} loss is {loss} at step {step}"
    if loss > growth.max_loss:
        return f"{what} loss {loss:.4g} is above growth.max_loss {growth.max_loss} at step {step}"
    return ""


class _Logs:
    """The candidate's own files, written by the coordinator."""

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._writes = folder, world.is_coordinator

    def trained(self, row: MetricRow) -> None:
        """Note a training step; the winner's become the run's."""
        self._append(TRAINING, dict(row))

    def evaluated(self, step: int, loss: float, batches: list[float]) -> None:
        """Note an evaluation ``step`` steps after growth."""
        entry = {"step": step, "val_loss": loss, "val_loss_batches": batches}
        self._append(CURVE, entry)

    def _append(self, name: str, entry: object) -> None:
        if self._writes:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
