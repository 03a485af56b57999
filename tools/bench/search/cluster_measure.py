"""Curves of this machine, and searches on 1, 2 and 4 ranks as predicted and as measured."""

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lag_megatron.config import load_config
from tools.bench.search.cluster_job import job_of
from tools.bench.search.cluster_model import Link, Machine, group_counts, search_cost
from tools.bench.search.group_throughput import LENGTH, ROWS, tree_of
from tools.bench.search.launched import Base, launch, make_base, run_search

RANKS = (1, 2, 4)
LAG = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A search as predicted and as measured, in seconds of one step and of the whole probing.

    The probing lasts from the first probe to the decision; the start is left out on both sides.
    """

    ranks: int
    groups: int
    step: float
    predicted_step: float
    search: float
    predicted_search: float

    @property
    def step_ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_step / self.step

    @property
    def search_ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_search / self.search

    @property
    def figures(self) -> dict[str, float]:
        """Both ratios by name."""
        name = f"{self.ranks}_ranks_{self.groups}_groups"
        return {f"{name}_step": self.step_ratio, f"{name}_search": self.search_ratio}

    def __str__(self) -> str:
        """One line of a table."""
        return (
            f"{self.ranks:>5} {self.groups:>6} {self.step * 1e3:>9.0f} "
            f"{self.predicted_step * 1e3:>9.0f} {self.step_ratio:>6.2f} {self.search:>10.1f} "
            f"{self.predicted_search:>9.1f} {self.search_ratio:>6.2f}"
        )


def measure(scratch: Path) -> tuple[Machine, list[Prediction]]:
    """The machine's curves, and a prediction for each number of ranks and of groups."""
    base = make_base(scratch / "cluster", tree_of(lag=LAG), ranks=max(RANKS))
    machine = _curves(base)
    config = load_config(base.config("job", {}))
    job = job_of(config, 1, config.growth_before(1))
    checks = []
    for ranks in RANKS:
        for groups in group_counts(job, ranks):
            name = f"{ranks}-{groups}"
            searched = run_search(base, name, {"probe_groups": groups}, ranks=ranks)
            steps = searched.steps_of_groups(tokens=ROWS * LENGTH)
            cost = search_cost(machine, job, ranks=ranks, groups=groups)
            checks.append(
                Prediction(
                    ranks=ranks,
                    groups=groups,
                    step=statistics.median(s for found in steps.values() for s in found),
                    predicted_step=cost.step,
                    search=searched.probing,
                    predicted_search=cost.wall - cost.start,
                )
            )
            searched.remove()
    return machine, checks


def _curves(base: Base) -> Machine:
    out = base.folder / "curves.json"
    config = base.config("curves", {})
    arguments = ["--config", str(config), "--base", str(base.checkpoint), "--out", str(out)]
    launch(Path(__file__).with_name("cluster_curves.py"), arguments, ranks=max(RANKS))
    found: dict[str, Any] = json.loads(out.read_text())
    link = _link(found["all_reduce"])
    cores = os.cpu_count() or 1
    shared = f"; {max(RANKS)} ranks share {cores} cores" if cores < max(RANKS) else ""
    return Machine(
        source=f"measured here, ranks of one thread on {cores} cores, gloo{shared}",
        computed=False,
        compute=tuple((tokens, seconds) for tokens, seconds in found["compute"]),
        optimizer_seconds=found["optimizer_seconds"],
        inside=link,
        between=link,
        ranks_per_host=max(RANKS),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / max(RANKS),
        state_rate=found["state_rate"],
        save_rate=found["save_rate"],
        disk_rate=max(RANKS) * found["save_rate"],
        contention=tuple((busy, slower) for busy, slower in found["contention"]),
    )


def _link(measured: list[tuple[int, int, float]]) -> Link:
    """Latency and rate that fit the all-reduces best, each weighed by its own time."""
    rows = [(2 / s, 2 * (n - 1) / n * size / s) for n, size, s in measured]
    (latency, per_byte), *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    return Link(latency=max(float(latency), 0.0), bytes_per_second=1 / max(float(per_byte), 1e-15))
