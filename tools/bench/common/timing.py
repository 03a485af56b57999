"""Median times of work on a device, and the device's own copy and matmul rates."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]
WARM_UPS = 2
_HEAD_START = 4_000_000  # of a GPU's cycles, about two milliseconds


def medians(
    works: Mapping[str, Work],
    device: torch.device,
    *,
    rounds: int,
    before: Work = lambda: None,
    ahead: bool = True,
) -> dict[str, float]:
    """Median seconds of each work.

    The works run in turns; ``before`` runs ahead of each and is not timed.  The first ``WARM_UPS``
    rounds do not count.  On a CPU the time is the process's own, so that other processes do not
    count.

    Args:
        ahead: keep a GPU busy until the work is queued, as in training, where the host runs ahead.
            Without it the time of the host between kernels counts too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(WARM_UPS + rounds):
        for name, work in works.items():
            before()
            taken = _seconds(work, device, ahead=ahead)
            if number >= WARM_UPS:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(work: Work, device: torch.device, *, ahead: bool) -> float:
    if device.type != "cuda":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(_HEAD_START)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_rate(device: torch.device, *, elements: int, rounds: int) -> float:
    """Bytes per second that a copy of fp32 reads and writes."""
    source, target = (torch.empty(elements, device=device).normal_() for _ in range(2))
    taken = medians({"copy": lambda: target.copy_(source)}, device, rounds=rounds)
    return 8 * elements / taken["copy"]


def matmul_rate(device: torch.device, *, size: int, rounds: int) -> float:
    """FLOP per second of a square product in bf16."""
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    taken = medians({"product": lambda: one @ other}, device, rounds=rounds)
    return 2 * size**3 / taken["product"]


def device_prefix(name: str) -> str:
    """Prefix of a GPU's figures: ``h200`` for every H200, else the device's name in lower case."""
    if "H200" in name:
        return "h200"
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "_".join(word for word in words if word != "nvidia")
