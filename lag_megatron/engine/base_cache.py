"""The base state of a growth event, cached in memory that the device reads.

All candidates of an event grow from one base.  The first is written from the base's shards.  For
the second, what a rank needs of the base is read into the cache, and each candidate is written from
there by one kernel launch.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape, collapse
from lag_megatron.checkpoint.state.layout import Container, State
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.growth.apply.copy_plan import Draw, Move
from lag_megatron.growth.apply.fill import GrowthFiller
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.weight_init import Constant, fill
from lag_megatron.kernels.common.runs import WriteRun

# Elements that are read and cached together.
PAGE = 1 << 20
# Pages begin at multiples of so many, so that the kernel loads four at a time.
_ALIGNED = 4
# Copies that are cut into more runs than these are left to the path that needs no table of them.
MAX_RUNS = 1 << 18
# What activations may still need on the device, and other processes in the host's memory.
# Of the latter torch's allocator takes up to twice what it is asked for.
_DEVICE_MARGIN, _HOST_SHARE = 1 / 16, 1 / 8


class _Buffer(NamedTuple):
    """One state's flat buffer in the source."""

    tensor_rank: int
    container: Container
    state: State


@dataclass(frozen=True, slots=True)
class MemoryTier:
    """Memory that the device reads, of which a cache may take a part.

    Attributes:
        name: for the log.
        free: bytes that may still be taken.
        allocate: makes a flat fp32 tensor of so many elements.
    """

    name: str
    free: Callable[[], float]
    allocate: Callable[[int], Tensor]


@dataclass(frozen=True, slots=True)
class Target:
    """A buffer of the engine's state that a growth overwrites.

    Attributes:
        region: what it holds.
        values: flat.
        weights: the model's weights that its values are cast to, flat; None where there are none.
    """

    region: Region
    values: Tensor
    weights: Tensor | None


class BaseCache:
    """One rank's part of the base state of an event.

    Args:
        tiers: where it may be cached, the fastest first.
        page: elements that are read together.
        verbose: whether to log where the base is cached; if it is not, that is always logged.
    """

    def __init__(
        self, tiers: Sequence[MemoryTier], *, page: int = PAGE, verbose: bool = False
    ) -> None:
        self._tiers, self._page, self._verbose = tiers, page, verbose
        self._path: Path | None = None
        self._pages: dict[tuple[_Buffer, int], Tensor] = {}
        self._disabled = False

    @classmethod
    def for_device(
        cls,
        device: torch.device,
        *,
        local_ranks: int,
        verbose: bool = False,
        on_device: bool = True,
    ) -> "BaseCache | None":
        """A cache in the device's memory or pinned in the host's; None on a CPU.

        On a CPU the mapped shards are in memory already.  Without ``on_device`` it is in the host's
        memory alone: a later step may need more of the device's than the first ones did.
        """
        if device.type != "cuda":
            return None

        def free() -> float:
            unused, total = torch.cuda.mem_get_info(device)
            return unused - _DEVICE_MARGIN * total

        pinned = MemoryTier(
            "pinned host memory",
            lambda: _available() * _HOST_SHARE / local_ranks,
            lambda n: torch.empty(n, pin_memory=True),
        )
        local = MemoryTier("device memory", free, lambda n: torch.empty(n, device=device))
        return cls([local, pinned] if on_device else [pinned], verbose=verbose)

    @torch.no_grad()
    def runs(
        self, growth: GrownState, fill: GrowthFiller, targets: Sequence[Target]
    ) -> list[WriteRun] | None:
        """What one kernel launch has to write; drawn values are in their places afterwards.

        Returns:
            None when the state has to be read from the shards: at the first growth from a base,
            when no step has yet shown how much memory is left, and when there is not enough.
        """
        if growth.source.path != self._path:
            self._path, self._disabled = growth.source.path, False
            self._pages.clear()
            return None
        if self._disabled:
            return None
        plans = [(target, fill.plan(target.region)) for target in targets]
        moves = [(t.region, s) for t, plan in plans for s in plan if isinstance(s, Move)]
        spans = sum(_count(step) for _, step in moves)
        if spans > MAX_RUNS:
            self._disable(f"its copies are {spans} runs, more than {MAX_RUNS}")
            return None
        if not self._read(fill, moves):
            return None
        return [run for target, plan in plans for run in self._write(target, plan)]

    def _disable(self, why: str) -> None:
        self._disabled = True
        self._pages.clear()
        _log(f"the base of this event is read from its shards for each candidate: {why}.")

    def _read(self, fill: GrowthFiller, moves: Sequence[tuple[Region, Move]]) -> bool:
        """Read the pages that are needed and not cached; whether there was memory for them."""
        missing: dict[tuple[_Buffer, int], Region] = {}
        for region, move in moves:
            buffer = _Buffer(move.tensor_rank, move.source.container, region.state)
            for _, start, count in _spans(move.shape, move.source.strides, move.source.strides):
                first = move.source.offset + start
                last = first + count - 1
                for number in range(first // self._page, last // self._page + 1):
                    if (buffer, number) not in self._pages:
                        missing[buffer, number] = region
        if not missing:
            return True
        lengths = [self._length(fill, region, *key) for key, region in missing.items()]
        ends = list(itertools.accumulate(-(-length // _ALIGNED) * _ALIGNED for length in lengths))
        tier = self._tier_for(4 * ends[-1])
        if tier is None:
            return False
        slab = tier.allocate(ends[-1])
        for (key, region), begin, length in zip(missing.items(), [0, *ends], lengths, strict=False):
            self._pages[key] = self._filled(slab[begin : begin + length], fill, region, *key)
        return True

    def _tier_for(self, wanted: int) -> MemoryTier | None:
        """The first tier with so many free bytes; None, which is logged, if there is none."""
        free = {tier.name: tier.free() for tier in self._tiers}
        tier = next((t for t in self._tiers if free[t.name] >= wanted), None)
        if tier is None:
            found = ", ".join(f"{size / 2**20:.0f} MiB of {name}" for name, size in free.items())
            self._disable(f"it takes {wanted / 2**20:.0f} MiB more, and there are {found}")
        elif self._verbose:
            _log(f"{wanted / 2**20:.0f} MiB of this event's base are kept in {tier.name}.")
        return tier

    def _length(self, fill: GrowthFiller, region: Region, buffer: _Buffer, number: int) -> int:
        """Elements of a page: fewer where its buffer ends."""
        source, _ = fill.sides(trained=True, state=region.state)
        return min(self._page, source.layout.filled[buffer.container] - number * self._page)

    def _filled(
        self, page: Tensor, fill: GrowthFiller, region: Region, buffer: _Buffer, number: int
    ) -> Tensor:
        """A page with its values."""
        there = fill.elements(region, buffer.tensor_rank, buffer.container)
        values = there.strided((len(page),), (1,), number * self._page)
        assert values.dtype is torch.float32, f"{buffer.state} is cached as {values.dtype}"
        return page.copy_(values)

    def _write(self, target: Target, plan: Sequence[Move | Draw]) -> Iterator[WriteRun]:
        """The runs of one buffer; padding becomes 0."""
        yield from _gaps(target)
        for step in plan:
            if isinstance(step, Move):
                yield from self._copies(target, step)
            elif isinstance(step.init, Constant):
                for start, _, count in _spans(step.shape, step.target.strides, step.target.strides):
                    yield _run(target, step.target.offset + start, None, count, step.init.value)
            else:
                yield from _drawn(target, step)

    def _copies(self, target: Target, move: Move) -> Iterator[WriteRun]:
        buffer = _Buffer(move.tensor_rank, move.source.container, target.region.state)
        for there, here, count in _spans(move.shape, move.target.strides, move.source.strides):
            start, end = move.source.offset + here, move.source.offset + here + count
            place = move.target.offset + there
            while start < end:
                number, skip = divmod(start, self._page)
                length = min(end - start, self._page - skip)
                source = self._pages[buffer, number][skip : skip + length]
                yield _run(target, place, source, length, move.scale)
                start, place = start + length, place + length


def _run(target: Target, start: int, source: Tensor | None, count: int, scale: float) -> WriteRun:
    here = slice(start, start + count)
    weights = None if target.weights is None else target.weights[here]
    return WriteRun(target.values[here], source, scale, weights)


def _drawn(target: Target, step: Draw) -> Iterator[WriteRun]:
    """Draw the values into their places; what is left to write is the weights."""
    values = target.values
    start = values.storage_offset() + step.target.offset
    view = values.as_strided(step.shape, step.target.strides, start)
    fill(view, step.init, shape=step.full_shape, box=step.box)
    if target.weights is None:
        return
    for start, _, count in _spans(step.shape, step.target.strides, step.target.strides):
        here = slice(step.target.offset + start, step.target.offset + start + count)
        drawn = values[here]
        yield WriteRun(drawn, drawn, 1.0, target.weights[here])


def _gaps(target: Target) -> Iterator[WriteRun]:
    """Zeros between and after the segments of a buffer."""
    end = 0
    for begin, length in (
        *((segment.offset, segment.length) for _, segment in target.region.segments),
        (target.region.length, 0),
    ):
        if begin > end:
            yield _run(target, end, None, begin - end, 0.0)
        end = begin + length


def _spans(shape: Shape, one: Shape, other: Shape) -> Iterator[tuple[int, int, int]]:
    """Strided elements as runs: their offsets by two sets of strides, and their lengths."""
    outer, count, (one, other) = _outer(shape, one, other)
    for place in np.ndindex(*outer):
        yield _dot(place, one), _dot(place, other), count


def _outer(shape: Shape, *strides: Shape) -> tuple[Shape, int, tuple[Shape, ...]]:
    """Extents around the runs, the runs' length, and strides."""
    shape, steps = collapse(shape, *strides)
    if all(step[-1] == 1 for step in steps):
        return shape[:-1], shape[-1], steps
    return shape, 1, steps


def _count(move: Move) -> int:
    outer, *_ = _outer(move.shape, move.target.strides, move.source.strides)
    return int(np.prod(outer))


def _dot(place: Sequence[int], strides: Shape) -> int:
    return sum(a * b for a, b in zip(place, strides, strict=False))


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _available() -> float:
    """Bytes of the host's memory that processes could still take."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
