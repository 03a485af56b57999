"""Medians of work that a device does, in turns, and what the device can do at most."""

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
    """Seconds of each work; they run in turns, ``before`` ahead of each, which is not timed.

    On a CPU they are the process's own: others may be at work besides.  With ``ahead`` a GPU is
    kept busy until the work is on its way, as in training, where the host runs ahead; without, what
    the host does in between counts too.
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
    """Bytes a second that a copy of fp32 reads and writes."""
    source, target = (torch.empty(elements, device=device).normal_() for _ in range(2))
    taken = medians({"copy": lambda: target.copy_(source)}, device, rounds=rounds)
    return 8 * elements / taken["copy"]


def matmul_rate(device: torch.device, *, size: int, rounds: int) -> float:
    """bf16 FLOP a second of a square product."""
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    taken = medians({"product": lambda: one @ other}, device, rounds=rounds)
    return 2 * size**3 / taken["product"]


def device_prefix(name: str) -> str:
    """What figures of a GPU begin with: ``h200`` for any that is one, else its own name."""
    if "H200" in name:
        return "h200"
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "_".join(word for word in words if word != "nvidia")
