"""What a search costs on any number of devices, from measured or assumed curves.  Arithmetic only.

A step of a group of n ranks is its micro-batches, its share of the optimizer and one all-reduce of
the gradients (ZeRO's reduce-scatter and all-gather move as much); nothing is hidden behind anything
else.  Candidates of a rung go to the groups as these come free, and a rung begins when the one
before has ended, as in a real search.  Not modelled: a group that goes on with its candidate saves
a switch.  All devices are equally fast.
"""

import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lag_megatron.config import ParallelConfig
from lag_megatron.planning.cost import state_bytes_per_parameter

# What activations and buffers leave of a device for the state, as for ``probe_groups: auto``.
STATE_SHARE = 0.6
GB = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A network link: seconds before the first byte, and bytes a second that each rank sends."""

    latency: float
    bytes_per_second: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of a ring over ``ranks``: each sends 2 (n - 1) / n of ``size``."""
        if ranks <= 1:
            return 0.0
        return 2 * self.latency + 2 * (ranks - 1) / ranks * size / self.bytes_per_second


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Curves of one kind of device, for one model.

    Attributes:
        source: where the numbers come from; printed with every table.
        computed: true where they are arithmetic rather than measured here.
        compute: tokens of a micro-batch and seconds of its forward and backward on one rank,
            rising; between the points linear, below the first constant, above the last in line
            with the last two.
        optimizer_seconds: one optimizer step on a whole state by one rank.
        inside: between the ranks of a host.
        between: between hosts, for each rank.
        ranks_per_host: ranks of a host.
        memory: bytes of a device.
        state_rate: bytes a second at which one rank takes over its part of a state.
        save_rate: bytes a second at which one rank writes its part of a state.
        disk_rate: bytes a second that all ranks together write at most.
        start_seconds: from the launch to the first probe: processes, engines, text.
        turn_seconds: what a turn costs besides: the coordinator, files flushed.
        contention: busy ranks of a host and how many times slower each then computes, rising;
            between the points linear.
    """

    source: str
    computed: bool
    compute: tuple[tuple[float, float], ...]
    optimizer_seconds: float
    inside: Link
    between: Link
    ranks_per_host: int
    memory: float
    state_rate: float
    save_rate: float
    disk_rate: float
    start_seconds: float = 0.0
    turn_seconds: float = 0.0
    contention: tuple[tuple[float, float], ...] = ((1, 1.0),)

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds; over several hosts each of a host's ranks carries its part of the bytes."""
        inside = min(ranks, self.ranks_per_host)
        hosts = -(-ranks // self.ranks_per_host)
        return self.inside.all_reduce(size, inside) + self.between.all_reduce(size / inside, hosts)

    def pass_seconds(self, tokens: float) -> float:
        """Forward and backward of one micro-batch."""
        return _interpolated(self.compute, tokens)

    def slower(self, ranks: int) -> float:
        """How many times slower a rank computes while ``ranks`` are at work."""
        return _interpolated(self.contention, min(ranks, self.ranks_per_host), beyond=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchJob:
    """What a search asks of a cluster.

    Attributes:
        rows: sequences of the global batch.
        length: tokens of a sequence.
        micro_rows: sequences of a micro-batch at most.
        parameters: of the grown model.
        evaluation_tokens: of one evaluation.
        rungs: each rung's step, how many candidates train to it, and evaluations on the way.
    """

    rows: int
    length: int
    micro_rows: int
    parameters: float
    evaluation_tokens: float
    rungs: tuple[tuple[int, int, int], ...]
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def gradient_bytes(self) -> float:
        """What an all-reduce moves."""
        return self.parameters * (4 if self.parallel.precision == "fp32" else 2)

    @property
    def saved_bytes(self) -> float:
        """A checkpoint, all ranks together."""
        widths = state_bytes_per_parameter(self.parallel, replicas=1)
        return self.parameters * (widths["weights"] + widths["optimizer"])

    @property
    def train_steps(self) -> int:
        """Optimizer steps of all probes."""
        before = [0, *(rung for rung, _, _ in self.rungs)]
        return sum((r - b) * n for b, (r, n, _) in zip(before, self.rungs, strict=False))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """A search in seconds, on ``groups`` groups of ``ranks`` each."""

    groups: int
    ranks: int
    step: float
    wall: float
    start: float
    training: float
    communication: float
    other: float
    fits: bool

    @property
    def idle(self) -> float:
        """Share of the probing during which groups wait for the end of a rung."""
        work = (self.training + self.other) / self.groups
        return max(0.0, 1 - work / (self.wall - self.start))


def step_seconds(machine: Machine, job: SearchJob, ranks: int, *, busy: int) -> tuple[float, float]:
    """One optimizer step of a group, all of it and its communication, while ``busy`` ranks work."""
    rows = job.rows // ranks
    whole, rest = divmod(rows, job.micro_rows)
    passes = whole * machine.pass_seconds(job.micro_rows * job.length)
    if rest:
        passes += machine.pass_seconds(rest * job.length)
    shared = ranks if job.parallel.zero_stage else 1
    compute = (passes + machine.optimizer_seconds / shared) * machine.slower(busy)
    communication = machine.all_reduce(job.gradient_bytes, ranks)
    return compute + communication, communication


def makespan(durations: Sequence[float], groups: int) -> float:
    """Seconds until all groups are done, where each takes the next task as soon as it is free."""
    free = [0.0] * groups
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def wall_seconds(rungs: Sequence[Sequence[float]], groups: int) -> float:
    """Seconds of all rungs, each of which waits for the end of the one before."""
    return sum(makespan(durations, groups) for durations in rungs)


def search_cost(machine: Machine, job: SearchJob, *, ranks: int, groups: int) -> Cost:
    """A search of all ranks in so many groups."""
    each = ranks // groups
    step, communication = step_seconds(machine, job, each, busy=ranks)
    other, rungs, before = 0.0, [], 0
    for rung, candidates, evaluations in job.rungs:
        last = rung == job.rungs[-1][0]
        saves = _expected_saves(candidates) / candidates if last else 1.0
        overhead = _overhead_seconds(
            machine, job, each, ranks, evaluations=evaluations, saves=saves
        )
        rungs.append([overhead + (rung - before) * step] * candidates)
        other += overhead * candidates
        before = rung
    return Cost(
        groups=groups,
        ranks=each,
        step=step,
        wall=machine.start_seconds + wall_seconds(rungs, groups),
        start=machine.start_seconds,
        training=job.train_steps * step,
        communication=job.train_steps * communication,
        other=other,
        fits=fits(machine, job, each),
    )


def _expected_saves(candidates: int) -> float:
    """Mean number of candidates that are the best so far when they end: only those are saved."""
    return sum(1 / place for place in range(1, candidates + 1))


def _overhead_seconds(
    machine: Machine, job: SearchJob, each: int, ranks: int, *, evaluations: int, saves: float
) -> float:
    """Seconds besides training that a candidate takes on the way to a rung."""
    groups = ranks // each
    slower = machine.slower(ranks)
    taking = job.saved_bytes / each / machine.state_rate * slower
    saving = job.saved_bytes / min(each * machine.save_rate / slower, machine.disk_rate / groups)
    tokens = job.evaluation_tokens / each
    micro = min(job.micro_rows, max(job.rows // each, 1)) * job.length
    # A forward pass is a third of forward and backward.
    forward = tokens / micro * machine.pass_seconds(micro) / 3 * slower
    return taking + saves * saving + evaluations * forward + machine.turn_seconds


def fits(machine: Machine, job: SearchJob, ranks: int) -> bool:
    """Whether the ranks of one group hold the state: ZeRO spreads it over them alone."""
    widths = state_bytes_per_parameter(job.parallel, replicas=ranks)
    return job.parameters * sum(widths.values()) <= STATE_SHARE * machine.memory


def group_counts(job: SearchJob, ranks: int) -> Iterator[int]:
    """Numbers of groups that cut ranks and batch evenly and leave none without a candidate."""
    candidates = job.rungs[0][1]
    for groups in range(1, min(ranks, candidates) + 1):
        if ranks % groups == 0 and job.rows % (ranks // groups) == 0:
            yield groups


def read_machine(path: Path) -> Machine:
    """Read what :func:`write_machine` wrote."""
    tree: dict[str, Any] = json.loads(path.read_text())
    tree |= {name: Link(**tree[name]) for name in ("inside", "between")}
    tree |= {name: tuple(map(tuple, tree[name])) for name in ("compute", "contention")}
    return Machine(**tree)


def write_machine(machine: Machine, path: Path) -> None:
    """Write the curves as JSON."""
    path.write_text(json.dumps(asdict(machine), indent=1))


def _interpolated(points: Sequence[tuple[float, float]], x: float, *, beyond: bool = True) -> float:
    """Linear between points, constant below the first; above the last in line, or constant."""
    if x <= points[0][0] or len(points) == 1:
        return points[0][1]
    last = len(points) - 1
    if x >= points[last][0] and not beyond:
        return points[last][1]
    right = next((i for i, (at, _) in enumerate(points) if at >= x), last)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
