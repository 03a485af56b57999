"""A probe group: one live engine that takes one candidate after another some steps further."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import require_sound
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config import GrowthConfig
from lag_megatron.distributed.watchdog import watched
from lag_megatron.distributed.world import World, local_ranks
from lag_megatron.engine.base_cache import KeptBase
from lag_megatron.engine.ema import WeightAverage, fits
from lag_megatron.engine.engine import Engine
from lag_megatron.engine.save import save_engine
from lag_megatron.engine.step_result import mean
from lag_megatron.engine.training_context import TrainingContext
from lag_megatron.errors import RunError
from lag_megatron.growth.apply.grown_state import Growth, resharding
from lag_megatron.growth.pool import Candidate
from lag_megatron.planning.cost import tokens_per_step
from lag_megatron.run.metrics import MetricRow
from lag_megatron.run.signals import Stopped
from lag_megatron.search.candidate_dir import CURVE, TRAINING, CandidateDir
from lag_megatron.search.event import Assignment, GrowthEvent, ProbeResult

NeedsCheckpointFn = Callable[[ProbeResult], bool]


@dataclass(slots=True)
class _LoadedCandidate:
    """The candidate whose state is in the engine."""

    index: int
    steps: int
    context: TrainingContext
    growth: Growth
    average: WeightAverage | None


class ProbeWorker:
    """The ranks of one engine; each has one of these and they call its methods together.

    Args:
        context: with the feed of this group's world.
        engine: of the event's target depth.
        event: what is probed.
        count: how many groups there are.
    """

    def __init__(
        self, context: TrainingContext, engine: Engine, event: GrowthEvent, *, count: int
    ) -> None:
        self.context, self.engine, self.event, self.count = context, engine, event, count
        self._loaded: _LoadedCandidate | None = None
        world, talks = engine.world, engine.world.is_coordinator
        ranks, spare = (
            local_ranks(world.size),
            not context.config.has_paths,
        )  # later ones may be longer
        self._base = KeptBase.on(world.device, local_ranks=ranks, talks=talks, spare=spare)
        self._fits = False  # a step of this engine has not run out of memory

    def release(self) -> None:
        """Let go of the engine, which is about to be destroyed."""
        self._loaded = self._base = None

    @property
    def world(self) -> World:
        """The ranks of this group."""
        return self.engine.world

    @property
    def loaded_candidate(self) -> int | None:
        """The candidate whose state need not be loaded."""
        return self._loaded.index if self._loaded else None

    def advance(self, assignment: Assignment, needs_checkpoint: NeedsCheckpointFn) -> ProbeResult:
        """Train a candidate to a rung, evaluate it on the way, and save it if it may still win.

        ``needs_checkpoint`` is asked on the group's leader alone.

        Raises:
            Stopped: when a signal asked for it; what was trained is saved.
            RunError: when the candidate ran out of memory: it has lost, and this process ends.
        """
        assert assignment.candidate is not None
        started = time.perf_counter()
        candidate = self.event.pool[assignment.candidate]
        candidate_dir = self._candidate_dir(candidate)
        with self._limits(candidate_dir, candidate, assignment) as progressed:
            loaded = self._load_candidate(assignment, candidate, candidate_dir)
            trained, failure = self._train(loaded, assignment.rung, candidate_dir, progressed)
            result = ProbeResult(
                candidate=assignment.candidate,
                rung=assignment.rung,
                steps=loaded.steps,
                evaluations=tuple(self.world.from_coordinator(candidate_dir.curve)),
                trained=tuple(trained),
                failure=failure,
            )
            state = None
            if failure:
                self._loaded = None  # its state is of no use
            elif self.world.from_coordinator(lambda: needs_checkpoint(result)):
                state = self._save(loaded, candidate_dir)
        self.world.from_coordinator(candidate_dir.flush)
        name = state.name if state else None
        return replace(result, state=name, seconds=time.perf_counter() - started)

    def _candidate_dir(self, candidate: Candidate) -> CandidateDir:
        path = self.context.run.probe(self.event.number, candidate.id)
        return CandidateDir(path, self.event.base_step)

    # Taking over a state

    def _load_candidate(
        self, assignment: Assignment, candidate: Candidate, candidate_dir: CandidateDir
    ) -> _LoadedCandidate:
        """Have the candidate in the engine, as far trained as it is anywhere."""
        loaded = self._loaded
        if loaded is not None and (loaded.index, loaded.steps) == (
            assignment.candidate,
            assignment.trained,
        ):
            return loaded
        self._loaded = None
        steps = self.world.from_coordinator(
            lambda: candidate_dir.resume(rung=assignment.rung, usable=self._usable)
        )
        growth = self._growth(candidate, candidate_dir.state_at(steps) if steps else None)
        self.engine.grow_from(growth, None if steps else self._base)
        average = WeightAverage(self.engine.live) if self._averages else None
        if average and steps:
            average.load(candidate_dir.state_at(steps), rank=self.world.rank, size=self.world.size)
        assert assignment.candidate is not None
        context = self.context.with_paths(self.event.number, candidate.path_length)
        self._loaded = _LoadedCandidate(assignment.candidate, steps, context, growth, average)
        return self._loaded

    def _usable(self, state: Path) -> bool:
        """Whether an average that goes with a state is spread as this engine is."""
        return not self._averages or (
            fits(state, size=self.world.size)
            and ZeroCheckpoint.open(state).topology == self.engine.topology
        )

    def _growth(self, candidate: Candidate, state: Path | None) -> Growth:
        """What makes the engine's state: the base through the plan, or a saved state as it is."""
        opened: list[Growth] = []

        def open_source() -> None:
            if state is None:
                source = ZeroCheckpoint.open(self.event.base)
                opened.append(Growth(source, candidate.plan, self.engine.topology))
                return
            names = sorted(manifest.check_sizes(state)["files"])
            require_sound(state, names[self.world.rank :: self.world.size])
            opened.append(resharding(ZeroCheckpoint.open(state), self.engine.topology))

        self.world.from_each(open_source)  # a rank that failed alone would leave the others waiting
        return opened[0]

    @property
    def _averages(self) -> bool:
        return self.event.growth.compared_by == "ema"

    # Training

    def _train(
        self,
        loaded: _LoadedCandidate,
        rung: int,
        candidate_dir: CandidateDir,
        progressed: Callable[[], None],
    ) -> tuple[list[MetricRow], str]:
        """The metrics of the steps taken and the reason of a failure."""
        trained: list[MetricRow] = []
        known = {row["step"] for row in self.world.from_coordinator(candidate_dir.curve)}
        for point in (step for step in self.event.evaluations if step <= rung):
            while loaded.steps < point:
                row, failure = self._step(loaded, candidate_dir)
                if failure:
                    return trained, failure
                trained.append(row)
                self._fits = True
                progressed()
            if loaded.steps == point and point not in known:
                evaluation, failure = self._evaluate(loaded)
                if failure:
                    return trained, failure
                self._note(candidate_dir, CURVE, evaluation)
            progressed()
        return trained, ""

    def _step(self, loaded: _LoadedCandidate, candidate_dir: CandidateDir) -> tuple[MetricRow, str]:
        growth, event = self.event.growth, self.event
        row, stop = loaded.context.step(
            self.engine, event.base_step + loaded.steps, stage=event.number
        )
        loaded.steps += 1
        failure = _failure(float(row["train/loss"]), growth, "training", loaded.steps)
        if not math.isfinite(float(row.get("train/grad_norm", 0.0))):
            failure = f"gradient norm is {row['train/grad_norm']} at step {loaded.steps}"
        if failure:
            return row, failure
        if loaded.average:
            loaded.average.update(loaded.steps)
        self._note(candidate_dir, TRAINING, row)
        if stop or loaded.steps % self.context.config.checkpoint.interval == 0:
            self._save(loaded, candidate_dir)
        if stop:
            raise Stopped(self.context.stop.why)
        return row, ""

    def _evaluate(self, loaded: _LoadedCandidate) -> tuple[dict[str, Any], str]:
        """A line of the curve and the reason of a failure."""
        growth, batches = self.event.growth, self.context.evaluate(self.engine)
        loss = mean(batches)
        line: dict[str, Any] = {"step": loaded.steps, "val_loss": loss, "val_loss_batches": batches}
        failure = _failure(loss, growth, "validation", loaded.steps)
        if loaded.average and not failure:
            if loaded.steps:
                with loaded.average.in_place():
                    batches = self.context.evaluate(self.engine)
                loss = mean(batches)
            line |= {"ema_val_loss": loss, "ema_val_loss_batches": batches}
            failure = _failure(loss, growth, "averaged weights' validation", loaded.steps)
        return line, failure

    def _note(self, candidate_dir: CandidateDir, name: str, line: dict[str, Any]) -> None:
        if self.world.is_coordinator:
            candidate_dir.add(name, [line])

    def _save(self, loaded: _LoadedCandidate, candidate_dir: CandidateDir) -> Path:
        """Save the state and forget the candidate's earlier ones."""
        state, world = candidate_dir.state_at(loaded.steps), self.world
        step = self.event.base_step + loaded.steps
        world.from_coordinator(candidate_dir.flush)
        save_engine(
            self.engine,
            state,
            step=step,
            tokens=step * tokens_per_step(self.context.config),
            history=loaded.growth.client_state["growth_history"],
            growth=loaded.growth,
            average=loaded.average,
        )
        world.from_coordinator(lambda: candidate_dir.keep_only(state))
        return state

    # Limits

    @contextlib.contextmanager
    def _limits(
        self, candidate_dir: CandidateDir, candidate: Candidate, assignment: Assignment
    ) -> Iterator[Callable[[], None]]:
        """Lack of time and of memory: a file is left, this process ends, and with it the whole job.

        The other ranks of the group wait in a collective call and cannot be asked to go on.
        """
        seconds = self.event.growth.rung_timeout
        rank = dist.get_rank()
        stacks = self.context.run.root / "stacks" / f"{candidate.id}-rank{rank}.txt"

        def expired() -> str:
            candidate_dir.mark_hung(attempt=assignment.attempt, seconds=float(seconds or 0))
            return (
                f"[rank {rank}] {candidate.id}: no progress for growth.rung_timeout = {seconds:g} "
                f"s; all stacks are in {stacks.parent}. The same command goes on from the last "
                "saved states; after two such attempts the candidate has lost."
            )

        try:
            with watched(seconds, stacks=stacks, on_expiry=expired) as progressed:
                yield progressed
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            # All candidates have one shape: if the first step did not fit, no other will.
            if self._fits:
                candidate_dir.mark_failed(f"out of memory on rank {rank}: {what}", rank=rank)
            remedy = (
                "The candidate has lost; the same command goes on without it."
                if self._fits
                else "Not one step of the grown model fits: lower parallel.micro_batch or "
                "growth.probe_groups and run the same command again."
            )
            raise RunError(
                f"{candidate.id}: out of memory on rank {rank}: {what} {remedy}"
            ) from error


def _failure(loss: float, growth: GrowthConfig, what: str, step: int) -> str:
    if not math.isfinite(loss):
        return f"{what} loss is {loss} at step {step}"
    if loss > growth.max_loss:
        return f"{what} loss {loss:.4g} is above growth.max_loss {growth.max_loss} at step {step}"
    return ""


def _is_out_of_memory(error: BaseException) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    words = ("allocate memory", "OutOfMemoryError")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error) for word in words
    )
