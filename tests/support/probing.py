"""Probe groups without engines: real directories, journal and coordinator, made-up losses.

A candidate's loss is a function of its index and step alone, as training is one of state and step.
"""

import json
import math
import random
from dataclasses import replace

from conftest import pico_config

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.config import GrowthConfig
from lag_megatron.growth.pool import build_pool
from lag_megatron.run.directory import RunDirectory, step_of
from lag_megatron.run.journal import Journal
from lag_megatron.search.candidate_dir import CURVE, TRAINING, CandidateDir
from lag_megatron.search.coordinator import Coordinator
from lag_megatron.search.event import GrowthEvent, ProbeResult
from lag_megatron.training.probe_costs import step_costs

BASE_STEP = 100


class Killed(Exception):
    """As by kill -9: nothing after it happens."""


def loss_of(index, step):
    """Rankings cross in the first 5 steps, then stay."""
    noise = random.Random(f"{index} {step}").gauss(0, 0.002)
    lasting, passing = 0.02 * (index % 7), 0.03 * index * math.exp(-step / 1.5)
    return 4 + 2 * math.exp(-step / 8) + lasting - passing + noise


class SimulatedSearch:
    """A growth event on disk that groups can work on, be killed in, and begin again."""

    def __init__(self, root, *, losses=loss_of, stage_steps=50, **growth):
        settings = GrowthConfig(**({"rule": "halving", "lag": 20, "rungs": (5, 10, 20)} | growth))
        pool = build_pool(settings, source_layers=4, target_layers=6, seed=1, init_std=0.02)
        self.run = RunDirectory(root)
        root.mkdir(exist_ok=True)
        self.event = GrowthEvent(
            number=1, base=root / "stage00" / "step00000100", base_step=BASE_STEP,
            base_val_loss=6.0, source_layers=4, target_layers=6, stage_steps=stage_steps,
            growth=settings, pool=pool,
        )  # fmt: skip
        config = replace(pico_config(), growth=settings)
        self.costs = step_costs(config, self.event, vocab_size=64, validation_tokens=64)
        self.losses = losses
        self._steps = []  # appended to by many threads

    @property
    def trained(self):
        """Steps that all groups have taken together."""
        return len(self._steps)

    def coordinator(self):
        journal = Journal(self.run.journal)
        made = Coordinator(
            self.run, journal, self.event, costs=self.costs, on_result=lambda *unused: None
        )
        made.begin()
        return made

    def advance(
        self, assignment, needs_checkpoint, *, point=lambda name: None, interval=8, held=None
    ):
        """What a group does with an assignment; ``point`` may kill it at any named place."""
        candidate = self.event.pool[assignment.candidate]
        candidate_dir = CandidateDir(self.run.probe(1, candidate.id), BASE_STEP)
        steps = held if held is not None else candidate_dir.resume(rung=assignment.rung)
        known = {row["step"] for row in candidate_dir.curve()}
        failure = ""
        for at in (step for step in self.event.evaluations if step <= assignment.rung):
            while steps < at:
                point("step")
                steps += 1
                self._steps.append(steps)
                candidate_dir.add(TRAINING, [{"step": BASE_STEP + steps, "train/loss": 1.0}])
                if steps % interval == 0:
                    self._save(candidate_dir, steps, point)
            if steps == at and at not in known:
                loss = self.losses(assignment.candidate, at)
                if not math.isfinite(loss):
                    failure = f"validation loss is {loss} at step {at}"
                    break
                row = {"step": at, "val_loss": loss, "val_loss_batches": [loss - 0.1, loss + 0.1]}
                candidate_dir.add(CURVE, [row])
        rows = tuple(candidate_dir.curve())
        result = ProbeResult(
            assignment.candidate, assignment.rung, steps, rows, failure=failure, seconds=1.0
        )
        point("trained")
        if not failure and needs_checkpoint(result):
            self._save(candidate_dir, steps, point)
            result = replace(result, state=candidate_dir.state_at(steps).name)
        point("saved")
        return result

    def _save(self, candidate_dir, steps, point):
        state = candidate_dir.state_at(steps)
        if manifest.is_committed(state):
            return
        draft = manifest.temporary(state)
        manifest.remove_checkpoint(draft)
        draft.mkdir(parents=True)
        (draft / "shard").write_text(json.dumps(steps))
        point("saving")
        manifest.commit(
            state, files={"shard": manifest.file_entry(draft / "shard")}, metadata={"step": steps}
        )
        candidate_dir.keep_only(state)

    def work(self, *, point=lambda name: None, group=0):
        """One group to the end; returns the decision and the winner's state."""
        coordinator = self.coordinator()
        held = {}
        while True:
            assignment = coordinator.ask(group, next(iter(held), None), stopped=lambda: "")
            point("asked")
            if assignment.candidate is None:
                break
            result = self.advance(
                assignment,
                coordinator.needs_checkpoint,
                point=point,
                held=held.get(assignment.candidate),
            )
            held = {} if result.failure else {assignment.candidate: result.steps}
            coordinator.record(group, result)
            point("recorded")
        decision, rows = coordinator.decide()
        point("decided")
        state = coordinator.announce(decision)
        return decision, state, rows

    def states(self):
        """Saved states on disk, by candidate."""
        return {
            c.id: [
                step_of(p.name) - BASE_STEP
                for p in manifest.committed_tags(self.run.probe(1, c.id))
            ]
            for c in self.event.pool
        }


def killer(rng, share):
    """A point that kills with probability ``share``."""

    def point(name):
        if rng.random() < share:
            raise Killed(name)

    return point
