"""Offline growth against a plain copy of the same bytes, and against gathering the model."""

import os
import pickle
import shutil
import statistics
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint.families.layer_stack import largest_stack
from lag_megatron.checkpoint.state.layout import STATES
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.zero.file_names import optimizer_file
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.growth.apply.copy_plan import Move, plan_rank
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.growth_map import grown_names
from lag_megatron.growth.plan import GrowthPlan
from tools.bench.common import synthetic

ROUNDS = 5
_SAMPLE_S = 0.002


def copy_ratio(source: Path, plan: GrowthPlan, scratch: Path, *, workers: int) -> dict[str, float]:
    """Growing, growing without a look at the values, and copying the grown files, in turns."""
    target = scratch / "grown" / synthetic.TAG
    grow_checkpoint(source, target, plan, workers=workers)
    kept = target.rename(scratch / "kept")
    files = sorted(kept.glob("*.pt"))
    size = sum(path.stat().st_size for path in files)
    seconds: dict[str, list[float]] = {"grow": [], "unchecked": [], "copy": []}
    for _ in range(ROUNDS):
        with _timed(seconds["grow"]):
            grow_checkpoint(source, target, plan, workers=workers)
        shutil.rmtree(target.parent)
        with _timed(seconds["unchecked"]):
            grow_checkpoint(source, target, plan, workers=workers, allow_nonfinite=True)
        shutil.rmtree(target.parent)
        with _timed(seconds["copy"]):
            copy_files(files, scratch / "copied", root=kept)
        shutil.rmtree(scratch / "copied")
    shutil.rmtree(kept)
    grow, unchecked, copy = (statistics.median(times) for times in seconds.values())
    return {
        "copy_ratio": copy / grow,
        "finite_check_ratio": grow / unchecked,
        "grow_gb_s": size / grow / 1e9,
        "copy_gb_s": size / copy / 1e9,
    }


def copy_files(files: list[Path], folder: Path, *, root: Path) -> None:
    """Copy files under ``root`` by sendfile, with fsync after each."""
    for path in files:
        place = folder / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, place.open("wb") as target:
            size, done = path.stat().st_size, 0
            while done < size:
                done += os.sendfile(target.fileno(), source.fileno(), done, size - done)
            os.fsync(target.fileno())


def worker_memory(source: Path, plan: GrowthPlan, scratch: Path) -> float:
    """Peak anonymous memory of one worker above its memory at the start, in MB."""
    target = scratch / "grown" / synthetic.TAG
    peak, _ = run_in_child(lambda: grow_checkpoint(source, target, plan, workers=1) and None)
    shutil.rmtree(target.parent)
    return peak / 1e6


def read_ratio(source: Path, plan: GrowthPlan, scratch: Path) -> float:
    """Bytes that a target rank reads with a cold page cache over those it needs; the worst rank."""
    ratios = []
    for data_rank in range(ZeroCheckpoint.open(source).topology.data_size):
        needed = _needed(source, plan, data_rank)
        os.sync()
        for path in source.glob("*.pt"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        folder = scratch / "rank"
        folder.mkdir()

        def write(folder: Path = folder, data_rank: int = data_rank) -> int:
            before = _read_bytes()
            growth = GrownState(ZeroCheckpoint.open(source), plan)
            growth.write_rank(folder, tensor_rank=0, data_rank=data_rank)
            return _read_bytes() - before

        _, read = run_in_child(write)
        shutil.rmtree(folder)
        ratios.append(read / needed)
    return max(ratios)


def _needed(source: Path, plan: GrowthPlan, data_rank: int) -> int:
    """Bytes of the source that a rank's plan names, each counted once."""
    growth = GrownState(ZeroCheckpoint.open(source), plan)
    sides = growth.filler(tensor_rank=0).sides(trained=True)
    regions = [
        Region(state, held, growth.layout.lengths[container])
        for container, held in growth.layout.buffers_of_rank(data_rank).items()
        for state in STATES
    ]
    if data_rank == 0:
        parts = [
            (name, segment) for name, held in growth.layout.segments.items() for segment in held
        ]
        regions.append(Region("fp32", tuple(parts), 0, forward=True))
    wanted: dict[Any, list[tuple[int, int]]] = {}
    for region in regions:
        for step in plan_rank(
            growth.growth_map, *sides, region.state, segments=region.segments, tensor_rank=0
        ):
            if isinstance(step, Move):
                low = step.source.offset
                key = (region.state, step.source.container)
                wanted.setdefault(key, []).append((low, low + step.shape[0]))
    return 4 * sum(_union(intervals) for intervals in wanted.values())


def _union(intervals: list[tuple[int, int]]) -> int:
    total, end = 0, 0
    for low, high in sorted(intervals):
        total += max(0, high - max(low, end))
        end = max(end, high)
    return total


def against_gathering(
    source: Path, plan: GrowthPlan, scratch: Path, *, workers: int
) -> dict[str, float]:
    """Time and memory against gathering the whole model, growing it and sharding it again."""
    target = scratch / "grown" / synthetic.TAG
    seconds: dict[str, list[float]] = {"usual": [], "ours": []}
    memory: dict[str, list[float]] = {"usual": [], "ours": []}
    ways: dict[str, Callable[[], object]] = {
        "usual": lambda: _gather_grow_shard(source, plan, target),
        "ours": lambda: grow_checkpoint(source, target, plan, workers=workers) and None,
    }
    for _ in range(ROUNDS):
        for name, way in ways.items():
            peak, spent = run_in_child(lambda way=way: _seconds_of(way))  # type: ignore[misc]
            seconds[name].append(spent)
            memory[name].append(peak)
            shutil.rmtree(target.parent)
    return {
        "gather_speedup": statistics.median(seconds["usual"]) / statistics.median(seconds["ours"]),
        "gather_memory_ratio": min(memory["usual"]) / max(memory["ours"]),
        "gather_seconds": statistics.median(seconds["usual"]),
    }


def _gather_grow_shard(source: Path, plan: GrowthPlan, target: Path) -> None:
    """Masters by DeepSpeed's zero_to_fp32, moments likewise; whole dictionaries; torch.save."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    old = ZeroCheckpoint.open(source)
    ranks = range(old.topology.data_size)
    shards = [
        torch.load(source / str(optimizer_file(old.topology, tensor_rank=0, data_rank=r)),
                   weights_only=False)
        for r in ranks
    ]  # fmt: skip
    whole = {"fp32": get_fp32_state_dict_from_zero_checkpoint(str(source.parent), source.name)}
    for moment in ("exp_avg", "exp_avg_sq"):
        whole[moment] = OrderedDict()
        for key, group in enumerate(old.groups):
            entries = [s["optimizer_state_dict"]["base_optimizer_state"]["state"] for s in shards]
            flat, at = torch.cat([entry[key][moment] for entry in entries]), 0
            for name, shape in group.items():
                size = int(torch.Size(shape).numel())
                whole[moment][name] = flat[at : at + size].view(shape)
                at += size
    stack = largest_stack({name: shape for group in old.groups for name, shape in group.items()})
    groups = [
        [(new, before) for new, before, _ in grown_names(list(group), plan.layer_map, stack)]
        for group in old.groups
    ]
    grown = {
        state: {new: tensors[before].clone() for group in groups for new, before in group}
        for state, tensors in whole.items()
    }
    target.mkdir(parents=True)
    _cut(old, shards, groups, grown, target)


def _cut(
    old: ZeroCheckpoint,
    shards: list[Any],
    groups: list[list[tuple[str, str]]],
    grown: dict[str, dict[str, torch.Tensor]],
    target: Path,
) -> None:
    size = old.topology.data_size
    for key, group in enumerate(groups):
        for state, tensors in grown.items():
            flat = torch.cat([tensors[new].flatten() for new, _ in group])
            unit = 2 * size
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % unit))
            for shard, part in zip(shards, flat.chunk(size), strict=True):
                optimizer = shard["optimizer_state_dict"]
                if state == "fp32":
                    optimizer["single_partition_of_fp32_groups"][key] = part.clone()
                else:
                    optimizer["base_optimizer_state"]["state"][key][state] = part.clone()
    for rank, shard in enumerate(shards):
        torch.save(shard, target / str(optimizer_file(old.topology, tensor_rank=0, data_rank=rank)))
    module = {name: tensor.to(torch.bfloat16) for name, tensor in grown["fp32"].items()}
    torch.save({**old.header, "module": module}, target / "mp_rank_00_model_states.pt")
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


# Measuring


def run_in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """Peak anonymous memory of a child process above its start, and the result of ``work``."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            start, highest = _anonymous(), [0]
            ended = threading.Event()
            watcher = threading.Thread(target=_watch, args=(highest, ended), daemon=True)
            watcher.start()
            result = work()
            ended.set()
            watcher.join()
            os.write(send, pickle.dumps((highest[0] - start, result)))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    if not data:
        raise RuntimeError("the measured process failed; its message stands above")
    return pickle.loads(data)  # type: ignore[no-any-return]


def _watch(highest: list[int], ended: threading.Event) -> None:
    while not ended.wait(_SAMPLE_S):
        highest[0] = max(highest[0], _anonymous())


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def _seconds_of(way: Callable[[], object]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)
