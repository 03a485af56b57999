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
from lag_megatron.engine.training_context import Job, MetricRow
from lag_megatron.errors import RunError
from lag_megatron.growth.apply.grown_state import GrownState, resharded
from lag_megatron.growth.pool import Candidate
from lag_megatron.planning.cost import tokens_per_step
from lag_megatron.run.signals import Stopped
from lag_megatron.search.candidate_dir import CURVE, TRAINING, CandidateFolder
from lag_megatron.search.event import Event, Progress, Turn

MayWin = Callable[[Progress], bool]


@dataclass(slots=True)
class _Held:
    """The candidate whose state is in the engine."""

    index: int
    steps: int
    job: Job
    growth: GrownState
    average: WeightAverage | None


class ProbeGroup:
    """The ranks of one engine; each has one of these and they call its methods together.

    Args:
        job: with the feed of this group's world.
        engine: of the event's target depth.
        event: what is probed.
        count: how many groups there are.
    """

    def __init__(self, job: Job, engine: Engine, event: Event, *, count: int) -> None:
        self.job, self.engine, self.event, self.count = job, engine, event, count
        self._held: _Held | None = None
        world, talks = engine.world, engine.world.is_coordinator
        ranks, spare = local_ranks(world.size), not job.config.has_paths  # later ones may be longer
        self._base = KeptBase.on(world.device, local_ranks=ranks, talks=talks, spare=spare)
        self._fits = False  # a step of this engine has not run out of memory

    def release(self) -> None:
        """Let go of the engine, which is about to be destroyed."""
        self._held = self._base = None

    @property
    def world(self) -> World:
        """The ranks of this group."""
        return self.engine.world

    @property
    def holds(self) -> int | None:
        """The candidate whose state need not be loaded."""
        return self._held.index if self._held else None

    def advance(self, turn: Turn, may_win: MayWin) -> Progress:
        """Train a candidate to a rung, evaluate it on the way, and save it if it may still win.

        ``may_win`` is asked on the group's leader alone.

        Raises:
            Stopped: when a signal asked for it; what was trained is saved.
            RunError: when the candidate ran out of memory: it has lost, and this process ends.
        """
        assert turn.candidate is not None
        started = time.perf_counter()
        candidate = self.event.pool[turn.candidate]
        folder = self._folder(candidate)
        with self._limits(folder, candidate, turn) as progressed:
            held = self._take_over(turn, candidate, folder)
            trained, failure = self._train(held, turn.rung, folder, progressed)
            progress = Progress(
                candidate=turn.candidate,
                rung=turn.rung,
                steps=held.steps,
                evaluations=tuple(self.world.from_coordinator(folder.curve)),
                trained=tuple(trained),
                failure=failure,
            )
            state = None
            if failure:
                self._held = None  # its state is of no use
            elif self.world.from_coordinator(lambda: may_win(progress)):
                state = self._save(held, folder)
        self.world.from_coordinator(folder.flush)
        name = state.name if state else None
        return replace(progress, state=name, seconds=time.perf_counter() - started)

    def _folder(self, candidate: Candidate) -> CandidateFolder:
        path = self.job.run.probe(self.event.number, candidate.id)
        return CandidateFolder(path, self.event.base_step)

    # Taking over a state

    def _take_over(self, turn: Turn, candidate: Candidate, folder: CandidateFolder) -> _Held:
        """Have the candidate in the engine, as far trained as it is anywhere."""
        held = self._held
        if held is not None and (held.index, held.steps) == (turn.candidate, turn.trained):
            return held
        self._held = None
        steps = self.world.from_coordinator(
            lambda: folder.resume(rung=turn.rung, usable=self._usable)
        )
        growth = self._growth(candidate, folder.state_at(steps) if steps else None)
        self.engine.grow_from(growth, None if steps else self._base)
        average = WeightAverage(self.engine.live) if self._averages else None
        if average and steps:
            average.load(folder.state_at(steps), rank=self.world.rank, size=self.world.size)
        assert turn.candidate is not None
        job = self.job.with_paths(self.event.number, candidate.path_length)
        self._held = _Held(turn.candidate, steps, job, growth, average)
        return self._held

    def _usable(self, state: Path) -> bool:
        """Whether an average that goes with a state is spread as this engine is."""
        return not self._averages or (
            fits(state, size=self.world.size)
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

        self.world.from_each(open_source)  # a rank that failed alone would leave the others waiting
        return opened[0]

    @property
    def _averages(self) -> bool:
        return self.event.growth.compared_by == "ema"

    # Training

    def _train(
        self, held: _Held, rung: int, folder: CandidateFolder, progressed: Callable[[], None]
    ) -> tuple[list[MetricRow], str]:
        """The metrics of the steps taken and the reason of a failure."""
        trained: list[MetricRow] = []
        known = {row["step"] for row in self.world.from_coordinator(folder.curve)}
        for point in (step for step in self.event.evaluations if step <= rung):
            while held.steps < point:
                row, failure = self._step(held, folder)
                if failure:
                    return trained, failure
                trained.append(row)
                self._fits = True
                progressed()
            if held.steps == point and point not in known:
                evaluation, failure = self._evaluate(held)
                if failure:
                    return trained, failure
                self._note(folder, CURVE, evaluation)
            progressed()
        return trained, ""

    def _step(self, held: _Held, folder: CandidateFolder) -> tuple[MetricRow, str]:
        growth, event = self.event.growth, self.event
        row, stop = held.job.step(self.engine, event.base_step + held.steps, stage=event.number)
        held.steps += 1
        failure = _failure(float(row["train/loss"]), growth, "training", held.steps)
        if not math.isfinite(float(row.get("train/grad_norm", 0.0))):
            failure = f"gradient norm is {row['train/grad_norm']} at step {held.steps}"
        if failure:
            return row, failure
        if held.average:
            held.average.update(held.steps)
        self._note(folder, TRAINING, row)
        if stop or held.steps % self.job.config.checkpoint.interval == 0:
            self._save(held, folder)
        if stop:
            raise Stopped(self.job.stop.why)
        return row, ""

    def _evaluate(self, held: _Held) -> tuple[dict[str, Any], str]:
        """A line of the curve and the reason of a failure."""
        growth, batches = self.event.growth, self.job.evaluate(self.engine)
        loss = mean(batches)
        line: dict[str, Any] = {"step": held.steps, "val_loss": loss, "val_loss_batches": batches}
        failure = _failure(loss, growth, "validation", held.steps)
        if held.average and not failure:
            if held.steps:
                with held.average.in_place():
                    batches = self.job.evaluate(self.engine)
                loss = mean(batches)
            line |= {"ema_val_loss": loss, "ema_val_loss_batches": batches}
            failure = _failure(loss, growth, "averaged weights' validation", held.steps)
        return line, failure

    def _note(self, folder: CandidateFolder, name: str, line: dict[str, Any]) -> None:
        if self.world.is_coordinator:
            folder.add(name, [line])

    def _save(self, held: _Held, folder: CandidateFolder) -> Path:
        """Save the state and forget the candidate's earlier ones."""
        state, world = folder.state_at(held.steps), self.world
        step = self.event.base_step + held.steps
        world.from_coordinator(folder.flush)
        save_engine(
            self.engine,
            state,
            step=step,
            tokens=step * tokens_per_step(self.job.config),
            history=held.growth.client_state["growth_history"],
            growth=held.growth,
            average=held.average,
        )
        world.from_coordinator(lambda: folder.keep_only(state))
        return state

    # Limits

    @contextlib.contextmanager
    def _limits(
        self, folder: CandidateFolder, candidate: Candidate, turn: Turn
    ) -> Iterator[Callable[[], None]]:
        """Lack of time and of memory: a word is left, this process ends, and with it the job.

        The other ranks of the group wait in a collective call and cannot be asked to go on.
        """
        seconds = self.event.growth.rung_timeout
        rank = dist.get_rank()
        stacks = self.job.run.root / "stacks" / f"{candidate.id}-rank{rank}.txt"

        def expired() -> str:
            folder.mark_hung(attempt=turn.attempt, seconds=float(seconds or 0))
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
                folder.mark_failed(f"out of memory on rank {rank}: {what}", rank=rank)
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
