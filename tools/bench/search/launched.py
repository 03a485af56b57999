"""Runs under the launcher that begin at a growth event, from a base trained beforehand."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lag_megatron.run.compile_cache import set_cache_dirs
from lag_megatron.run.directory import RunDirectory, tag_of
from lag_megatron.run.metrics import read_rows

ROOT = Path(__file__).resolve().parents[3]
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Base:
    """A run that stands at the end of its first stage; every search grows from its checkpoint.

    Attributes:
        folder: where runs lie beside each other and share the tokenized text.
        tree: configuration of a run of two stages; the second begins with the growth event.
    """

    folder: Path
    tree: Tree

    @property
    def steps(self) -> int:
        """Optimizer steps of the base."""
        return int(self.tree["stages"][0]["steps"])

    @property
    def checkpoint(self) -> Path:
        """What candidates grow from."""
        return RunDirectory(self.folder / "base").stage(0) / tag_of(self.steps)

    def config(self, name: str, growth: Mapping[str, Any]) -> Path:
        """The configuration file of a run with these growth settings over the base's."""
        path = self.folder / f"{name}.yaml"
        tree = {**self.tree, "growth": {**self.tree["growth"], **growth}}
        path.write_text(yaml.safe_dump(tree))
        return path


def make_base(folder: Path, tree: Tree, *, ranks: int) -> Base:
    """Train the first stage alone."""
    base = Base(folder, tree)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump({**tree, "stages": tree["stages"][:1]}))
    launch_run(path, folder / "base", ranks=ranks)
    return base


def run_search(base: Base, name: str, growth: Mapping[str, Any], *, ranks: int) -> "Searched":
    """The growth event of a run that finds its first stage done, under one launch, timed."""
    run = RunDirectory(base.folder / name)
    shutil.copytree(base.checkpoint, run.stage(0) / base.checkpoint.name)
    shutil.copy(base.folder / "base" / "metrics.jsonl", run.metrics)
    started = time.time()
    launch_run(base.config(name, growth), run.root, ranks=ranks)
    return Searched(run, started, time.time())


@dataclass(frozen=True, slots=True)
class Searched:
    """A search that has ended; times are seconds since the epoch."""

    run: RunDirectory
    started: float
    ended: float

    @property
    def decision(self) -> Tree:
        """``decision.json``."""
        found: Tree = json.loads((self.run.growth(1) / "decision.json").read_text())
        return found

    @property
    def coordinator_share(self) -> float:
        """The coordinator's working time over the time of the probes."""
        cost = self.decision["cost"]
        return float(cost["coordinator_seconds"] / cost["seconds"])

    def times(self, event: str) -> list[float]:
        """When the journal recorded events of this kind."""
        return [e["time"] for e in read_rows(self.run.journal) if e["event"] == event]

    @property
    def decided(self) -> float:
        """Seconds from the launch to the decision, the winner's state on disk."""
        return self.times("decision")[0] - self.started

    @property
    def probing(self) -> float:
        """Seconds from the first probe's begin to the decision."""
        return self.times("decision")[0] - self.times("probe_started")[0]

    def steps_of_groups(self, *, tokens: int) -> dict[int, list[float]]:
        """Seconds of each optimizer step, by the probe group that took it."""
        found: dict[int, list[float]] = {}
        for event in read_rows(self.run.journal):
            if event["event"] == "probe_eval" and "rung" in event:
                rows = read_rows(self.run.probe(1, event["id"]) / "train.jsonl")
                seconds = [tokens / row["train/tokens_per_second"] for row in rows]
                found.setdefault(event["group"], []).extend(seconds)
        return found

    def remove(self) -> None:
        """Delete the run directory."""
        shutil.rmtree(self.run.root)


def launch_run(config: Path, run_dir: Path, *, ranks: int) -> None:
    """A run to its end."""
    script = ROOT / "launch" / "train.py"
    launch(script, ["--config", str(config), "--run-dir", str(run_dir)], ranks=ranks)


def launch(script: Path, arguments: Sequence[str], *, ranks: int) -> None:
    """A program under the ``deepspeed`` launcher, on ranks of one thread each.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    port = str(random.SystemRandom().randrange(20_000, 32_000))
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "deepspeed"),
            *("--num_gpus", str(ranks), "--master_port", port),
            *(str(script), *arguments),
        ],
        capture_output=True,
        text=True,
        env=_environment(),
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def _environment() -> dict[str, str]:
    """DeepSpeed builds its communication op with the ninja beside this Python."""
    found = {**os.environ, "OMP_NUM_THREADS": "1"}
    set_cache_dirs(ROOT / ".cache", found)
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found.get("PATH", "")])
    return found
