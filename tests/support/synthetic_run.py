"""Run directories in the documented formats, for tests of what reads them."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lag_megatron.config import RunConfig, dump_config, parse_config
from lag_megatron.growth.pool import Candidate, build_pool

Json = dict[str, Any]

EVALUATIONS = (0, 10, 20, 40)
BASE_LOSS = 4.4


def make_config(
    layers: tuple[int, ...], *, steps: int = 600, pool: str | Json = "lag", **growth: Any
) -> RunConfig:
    model = {
        "num_layers": layers[0],
        "hidden_size": 128,
        "ffn_hidden_size": 512,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "seq_length": 128,
    }
    stages = [{"steps": steps if n == 0 else 200, "num_layers": c} for n, c in enumerate(layers)]
    settings = {
        "rule": "lag",
        "lag": 40,
        "rungs": [10, 20, 40],
        "pool": {"operator": pool} if isinstance(pool, str) else pool,
    }
    return parse_config({"model": model, "stages": stages, "growth": {**settings, **growth}})


class SyntheticRun:
    """Writes a run directory event by event, in the documented formats."""

    def __init__(
        self,
        path: Path,
        *,
        layers: tuple[int, ...] = (4, 6),
        pool: str | Json = "lag",
        **growth: Any,
    ) -> None:
        self.path = path
        self.config = make_config(layers, pool=pool, **growth)
        self.random = random.Random(7)
        self.time = 1.7e9
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(dump_config(self.config))
        run = {
            "name": "demo",
            "world_size": 2,
            "vocab_size": 4096,
            "parameters": [1_334_016 + n * 396_544 for n in range(len(layers))],
            "unigram_entropy": 6.1234,
            "data": {"train_tokens": 9_000_000, "validation_tokens": 65536},
            "device": "cpu",
        }
        (path / "run.json").write_text(json.dumps(run))
        self.event("run_started", world_size=2, resumed=False)

    def event(self, event: str, **fields: object) -> None:
        self.time += 1.5
        self.line(self.path / "journal.jsonl", {"event": event, "time": self.time, **fields})

    def line(self, path: Path, value: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(value) + "\n")

    def train(self, stage: int, *, until: int | None = None) -> None:
        start = sum(s.steps for s in self.config.stages[:stage])
        end = until or start + self.config.stages[stage].steps
        self.event(
            "stage_started", stage=stage, step=start, num_layers=self.config.layers_of(stage)
        )
        for step in range(start, end + 1):
            where = {"step": step, "tokens": step * 4096, "stage": stage}
            loss = 4.0 + 4.3 * math.exp(-step / 150) + self.random.gauss(0, 0.05)
            if step % 10 == 0 and step > start:
                values = {"train/loss": loss, "train/grad_norm": 1.0, "train/lr": 1e-3}
                speed = {"train/tokens_per_second": 20000 + step}
                self.line(self.path / "metrics.jsonl", {**where, **values, **speed})
            if step % 100 == 0:
                self.line(self.path / "metrics.jsonl", {**where, "val/loss": self.loss(step)})
        if until is None:
            self.event("stage_finished", stage=stage, step=end, val_loss=self.loss(end))

    def go_through(self) -> None:
        """All stages and growths, to the end."""
        for stage in range(len(self.config.stages)):
            if stage:
                self.grow(stage)
            self.train(stage)
        self.finish()

    def loss(self, step: int) -> float:
        return round(4.0 + 4.32 * math.exp(-step / 150), 4)

    def candidates(self, stage: int) -> tuple[Candidate, ...]:
        return build_pool(
            self.config.growth_before(stage),
            source_layers=self.config.layers_of(stage - 1),
            target_layers=self.config.layers_of(stage),
            seed=1,
            init_std=0.02,
        )

    def start_growth(self, number: int) -> tuple[Candidate, ...]:
        pool = self.candidates(number)
        folder = self.path / f"growth{number:02d}"
        folder.mkdir()
        (folder / "pool.json").write_text(json.dumps([c.describe() for c in pool]))
        self.event(
            "growth_started",
            growth=number,
            stage=number,
            step=sum(s.steps for s in self.config.stages[:number]),
            base="stage00/global_step600",
            base_val_loss=BASE_LOSS,
            source_layers=self.config.layers_of(number - 1),
            target_layers=self.config.layers_of(number),
            rule=self.config.growth.rule,
            lag=self.config.growth.lag,
            pool=[c.id for c in pool],
        )
        return pool

    def probe(
        self, number: int, id_: str, losses: Mapping[int, float], *, ending: str = "finished"
    ) -> Json:
        """One candidate's lines and journal; returns its entry in ``decision.json``."""
        self.event("probe_started", growth=number, id=id_)
        last = max(losses)
        for step, loss in losses.items():
            # Half a batch's noise apart: the second best is not a tie unless it is equal.
            batches = [loss + 0.01 * (n % 3 - 1) for n in range(8)]
            line = {"step": step, "val_loss": loss, "val_loss_batches": batches}
            self.line(self.path / f"growth{number:02d}" / id_ / "probe.jsonl", line)
        known = {"growth": number, "id": id_, "step": last, "seconds": 2.5}
        reason = "" if ending == "finished" else f"{id_} was {ending} <&>"
        if ending == "finished":
            state = f"growth{number:02d}/{id_}/step{last}"
            self.event("probe_finished", **known, val_loss=losses[last], state=state)
        else:
            self.event(f"probe_{ending}", **known, reason=reason)
        curve = [[step, loss] for step, loss in losses.items()]
        return {"id": id_, "status": ending, "reason": reason, "steps": last, "curve": curve}

    def decide(self, number: int, candidates: Sequence[Json], **fields: Any) -> None:
        """Write ``decision.json``: the best of the finished ones at the lag, unless told."""
        lag = fields.get("lag", self.config.growth.last_rung)
        steps = sum(candidate["steps"] for candidate in candidates)
        left = [c for c in candidates if c["status"] == "finished"]
        decision = {
            "growth": number,
            "rule": self.config.growth.rule,
            "lag": lag,
            "chosen": min(left, key=lambda c: dict(c["curve"])[lag])["id"],
            "base_val_loss": BASE_LOSS,
            "candidates": list(candidates),
            "cost": {
                "probe_steps": steps,
                "tokens": steps * 4096,
                "flops": 2.1e13,
                "seconds": 400.0,
                "exhaustive_steps": len(candidates) * lag,
            },
            "phase_transition": None,
            "ties": [],
            **fields,
        }
        path = self.path / f"growth{number:02d}" / "decision.json"
        path.write_text(json.dumps(decision))
        self.event("decision", growth=number, chosen=decision["chosen"], state="x")

    def grow(self, number: int, *, failed: str | None = None) -> None:
        """All of a growth event; losses at 0 rise with those at 40 falling, so LAG@0 errs."""
        entries = []
        for place, candidate in enumerate(self.start_growth(number)):
            if candidate.id == failed:
                reason = "validation loss 31.2 is above growth.max_loss 20.0 <&>"
                self.event("probe_failed", growth=number, id=failed, step=20, reason=reason)
                entries.append(
                    {"id": failed, "status": "failed", "reason": reason, "steps": 20, "curve": []}
                )
                continue
            spread = 0.1 * (place % 7) + 0.01 * place
            losses = (4.5 + 2 * spread, 4.4 + spread / 3, 4.35 - spread / 20, 4.3 - spread / 10)
            curve = dict(zip(EVALUATIONS, losses, strict=True))
            entries.append(self.probe(number, candidate.id, curve))
        self.decide(number, entries)

    def curves(self, number: int, steps: Sequence[int]) -> dict[str, dict[int, float]]:
        """Losses of a pool, as in the paper: random layers disturb least and end worst.

        What growth disturbed is forgotten within some ten steps, and the differences that last
        build up over some thirty.
        """
        curves = {}
        for candidate in self.candidates(number):
            options = candidate.plan.options
            random_layers = options["init"] == "random"
            place = float(str(options["index"])) / 8
            final = 0.05 * place + (0.06 if random_layers else 0.0) + self.random.gauss(0, 0.012)
            shock = (0.05 if random_layers else 0.9 - 0.5 * place) * self.random.uniform(0.8, 1.2)
            curves[candidate.id] = {
                t: BASE_LOSS
                - 0.35 * (1 - math.exp(-t / 90))
                + shock * math.exp(-t / 5)
                + final * (1 - math.exp(-t / 25))
                + self.random.gauss(0, 0.0015)
                for t in steps
            }
        return curves

    def grow_exhaustively(
        self, number: int, curves: Mapping[str, Mapping[int, float]], **fields: Any
    ) -> None:
        """An event in which every candidate was trained to the end."""
        self.start_growth(number)
        entries = [self.probe(number, id_, curve) for id_, curve in curves.items()]
        self.decide(number, entries, **fields)

    def finish(self) -> None:
        step = self.config.total_steps
        self.event("run_finished", step=step, val_loss=self.loss(step))
