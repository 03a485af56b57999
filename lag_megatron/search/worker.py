"""A probe worker: one engine on the ranks of a probe group, which trains assigned candidates."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import require_sound
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.distributed.world import World, local_world_size
from lag_megatron.engine.base_cache import BaseCache
from lag_megatron.engine.ema import WeightAverage, has_weight_average
from lag_megatron.engine.save import save_engine
from lag_megatron.engine.step_result import mean
from lag_megatron.growth.apply.grown_state import GrownState, resharded
from lag_megatron.growth.pool import Candidate
from lag_megatron.run.metrics import MetricRow
from lag_megatron.run.signals import Stopped
from lag_megatron.search.candidate_dir import CURVE, TRAINING, CandidateDir
from lag_megatron.search.context import ProbeTrainer, SearchContext
from lag_megatron.search.divergence import divergence
from lag_megatron.search.event import Assignment, GrowthEvent, ProbeResult
from lag_megatron.search.limits import memory_limit, time_limit

NeedsCheckpointFn = Callable[[ProbeResult], bool]


@dataclass(slots=True)
class _LoadedCandidate:
    """The candidate whose state is in the engine.

    Attributes:
        index: in the pool.
        steps: optimizer steps taken since growth.
        growth: what its state began as.
        average: of its weights, where candidates are compared by it.
    """

    index: int
    candidate: Candidate
    dir: CandidateDir
    steps: int
    growth: GrownState
    average: WeightAverage | None


class ProbeWorker:
    """Trains one candidate after another; every rank of the group has one and calls with it.

    Args:
        context: of the run.
        trainer: with an engine of the event's target depth on the ranks of this group.
        event: what is probed.
        count: how many groups there are.
    """

    def __init__(
        self, context: SearchContext, trainer: ProbeTrainer, event: GrowthEvent, *, count: int
    ) -> None:
        self.context, self.event, self.count = context, event, count
        self._trainer, self.engine = trainer, trainer.engine
        self._loaded: _LoadedCandidate | None = None
        self._base = BaseCache.for_device(
            self.world.device,
            local_ranks=local_world_size(self.world.size),
            verbose=self.world.is_coordinator,
            on_device=context.equal_memory,
        )
        self._step_fits = False  # a step of this engine has not run out of memory

    def release(self) -> None:
        """Drop all references to the engine's tensors, before it is destroyed."""
        self._loaded = self._base = None

    @property
    def world(self) -> World:
        """The ranks of this group."""
        return self.engine.world

    @property
    def loaded_candidate(self) -> int | None:
        """Index of the candidate whose state is in the engine."""
        return self._loaded.index if self._loaded else None

    def advance(self, assignment: Assignment, needs_checkpoint: NeedsCheckpointFn) -> ProbeResult:
        """Train a candidate to a rung, evaluate it on the way, and save it if it may still win.

        ``needs_checkpoint`` is called on the group's leader alone.

        Raises:
            Stopped: when the run is asked to end; what was trained is saved.
            RunError: when the candidate ran out of memory: it has lost, and this process ends.
        """
        assert assignment.candidate is not None
        started = time.perf_counter()
        candidate_dir = self._candidate_dir(self.event.pool[assignment.candidate])
        limit = time_limit(
            candidate_dir,
            attempt=assignment.attempt,
            seconds=self.event.growth.rung_timeout,
            stacks=self.context.run.root / "stacks",
        )
        with memory_limit(candidate_dir, step_fits=lambda: self._step_fits), limit as progressed:
            loaded = self._load_candidate(assignment)
            train_rows, failure = self._train(loaded, assignment.rung, progressed)
            result = ProbeResult(
                candidate=assignment.candidate,
                rung=assignment.rung,
                steps=loaded.steps,
                evaluations=tuple(self.world.run_on_rank0(candidate_dir.curve)),
                train_rows=tuple(train_rows),
                failure=failure,
            )
            state = None
            if failure:
                self._loaded = None  # its state is of no use
            elif self.world.run_on_rank0(lambda: needs_checkpoint(result)):
                state = self._save(loaded)
        self.world.run_on_rank0(candidate_dir.flush)
        name = state.name if state else None
        return replace(result, state=name, seconds=time.perf_counter() - started)

    def _candidate_dir(self, candidate: Candidate) -> CandidateDir:
        path = self.context.run.probe(self.event.number, candidate.id)
        return CandidateDir(path, self.event.base_step)

    # Loading a state

    def _load_candidate(self, assignment: Assignment) -> _LoadedCandidate:
        """Have the candidate in the engine, from memory, from its newest state or from the base."""
        loaded, index = self._loaded, assignment.candidate
        assert index is not None
        if loaded is not None and (loaded.index, loaded.steps) == (index, assignment.trained_steps):
            return loaded
        self._loaded = None
        candidate = self.event.pool[index]
        candidate_dir = self._candidate_dir(candidate)
        steps = self.world.run_on_rank0(
            lambda: candidate_dir.resume(rung=assignment.rung, usable=self._usable)
        )
        growth = self._growth(candidate, candidate_dir.state_at(steps) if steps else None)
        self.engine.grow_from(growth, None if steps else self._base)
        average = WeightAverage(self.engine.state) if self._averages else None
        if average and steps:
            average.load(candidate_dir.state_at(steps), rank=self.world.rank, size=self.world.size)
        self._loaded = _LoadedCandidate(index, candidate, candidate_dir, steps, growth, average)
        return self._loaded

    def _usable(self, state: Path) -> bool:
        """Whether the weight average that is saved with a state is sharded as this engine is."""
        return not self._averages or (
            has_weight_average(state, size=self.world.size)
            and ZeroCheckpoint.open(state).topology == self.engine.topology
        )

    def _growth(self, candidate: Candidate, state: Path | None) -> GrownState:
        """What makes the engine's state: the base through the plan, or a saved state as it is."""
        opened: list[GrownState] = []

        def open_source() -> None:
            if state is None:
                source = ZeroCheckpoint.open(self.event.base)
                opened.append(GrownState(source, candidate.plan, self.engine.topology))
                return
            names = sorted(manifest.check_sizes(state)["files"])
            require_sound(state, names[self.world.rank :: self.world.size])
            opened.append(resharded(ZeroCheckpoint.open(state), self.engine.topology))

        self.world.run_on_all_ranks(
            open_source
        )  # a rank that failed alone would leave the others waiting
        return opened[0]

    @property
    def _averages(self) -> bool:
        return self.event.growth.compared_by == "ema"

    # Training

    def _train(
        self, loaded: _LoadedCandidate, rung: int, progressed: Callable[[], None]
    ) -> tuple[list[MetricRow], str]:
        """The metrics of the steps taken and the reason of a failure."""
        rows: list[MetricRow] = []
        known = {row["step"] for row in self.world.run_on_rank0(loaded.dir.curve)}
        for point in (step for step in self.event.evaluations if step <= rung):
            while loaded.steps < point:
                row, failure = self._step(loaded)
                if failure:
                    return rows, failure
                rows.append(row)
                self._step_fits = True
                progressed()
            if loaded.steps == point and point not in known:
                evaluation, failure = self._evaluate(loaded)
                if failure:
                    return rows, failure
                self._add_row(loaded, CURVE, evaluation)
            progressed()
        return rows, ""

    def _step(self, loaded: _LoadedCandidate) -> tuple[MetricRow, str]:
        """One optimizer step: its metrics and the reason of a failure."""
        step = self.event.base_step + loaded.steps
        row, stop = self._trainer.train_step(loaded.candidate, step)
        loaded.steps += 1
        failure = divergence(float(row["train/loss"]), self.event.growth, "training", loaded.steps)
        if not math.isfinite(float(row.get("train/grad_norm", 0.0))):
            failure = f"gradient norm is {row['train/grad_norm']} at step {loaded.steps}"
        if failure:
            return row, failure
        if loaded.average:
            loaded.average.update(loaded.steps)
        self._add_row(loaded, TRAINING, row)
        if stop or loaded.steps % self.context.checkpoint_interval == 0:
            self._save(loaded)
        if stop:
            raise Stopped(self.context.stop.why)
        return row, ""

    def _evaluate(self, loaded: _LoadedCandidate) -> tuple[dict[str, Any], str]:
        """A line of the curve and the reason of a failure."""
        growth, batches = self.event.growth, self._trainer.evaluate()
        loss = mean(batches)
        line: dict[str, Any] = {"step": loaded.steps, "val_loss": loss, "val_loss_batches": batches}
        failure = divergence(loss, growth, "validation", loaded.steps)
        if loaded.average and not failure:
            if loaded.steps:  # right after growth the average is the weights
                with loaded.average.in_place():
                    batches = self._trainer.evaluate()
                loss = mean(batches)
            line |= {"ema_val_loss": loss, "ema_val_loss_batches": batches}
            failure = divergence(loss, growth, "averaged weights' validation", loaded.steps)
        return line, failure

    def _add_row(self, loaded: _LoadedCandidate, name: str, row: dict[str, Any]) -> None:
        if self.world.is_coordinator:
            loaded.dir.add(name, [row])

    def _save(self, loaded: _LoadedCandidate) -> Path:
        """Save the state and delete the candidate's earlier ones."""
        state, world = loaded.dir.state_at(loaded.steps), self.world
        step = self.event.base_step + loaded.steps
        world.run_on_rank0(loaded.dir.flush)
        save_engine(
            self.engine,
            state,
            step=step,
            tokens=step * self.context.costs.tokens_per_step,
            history=loaded.growth.client_state["growth_history"],
            growth=loaded.growth,
            average=loaded.average,
        )
        world.run_on_rank0(lambda: loaded.dir.keep_only(state))
        return state
