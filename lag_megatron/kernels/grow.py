"""Writing a grown state in one pass over device memory: masters, moments and the model's weights.

What is written is a list of runs; one launch takes all of them, whatever buffers they lie in.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch

from lag_megatron.kernels.common.runs import WriteRun, run_table


def write_runs(runs: Sequence[WriteRun]) -> None:
    """Write all runs; no two may write the same element, nor one read what another writes.

    Raises:
        LagError: if this device's kernel cannot be built.
    """
    runs = [run for run in runs if run.target.numel()]
    if not runs:
        return
    if runs[0].target.is_cuda:
        write_runs_on_gpu(runs)
    else:
        write_runs_by_torch(runs)


def write_runs_by_torch(runs: Sequence[WriteRun]) -> None:
    """The reference implementation, in torch operations; used on a CPU."""
    for run in runs:
        if run.source is None:
            run.target.fill_(run.scale)
        elif run.source is not run.target:
            torch.mul(run.source, run.scale, out=run.target)
        if run.weights is not None:
            run.weights.copy_(run.target)


def write_runs_on_gpu(runs: Sequence[WriteRun], *, by: str = "") -> None:
    """As :func:`write_runs` on a GPU with the kernel ``triton`` or ``cuda``; it is asynchronous.

    By default Triton's, where that is installed.
    """
    make_launch(runs, by=by)()


def make_launch(runs: Sequence[WriteRun], *, by: str = "") -> Callable[[], None]:
    """The launch that writes runs, with its table on the device; it may be repeated."""
    rows, scales = run_table(runs)
    if not len(rows):
        return lambda: None
    kinds = {run.weights.dtype for run in runs if run.weights is not None} or {torch.float32}
    assert len(kinds) == 1, f"weights of several types: {kinds}"
    device = runs[0].target.device
    if device.type == "cuda":
        rows, scales = (t.pin_memory().to(device, non_blocking=True) for t in (rows, scales))
    if (by or ("triton" if importlib.util.find_spec("triton") else "cuda")) == "triton":
        from lag_megatron.kernels.triton.grow_triton import grow_triton as launch
    else:
        from lag_megatron.kernels.cuda.grow_cuda import grow_cuda as launch
    (kind,) = kinds
    return lambda: launch(rows, scales, kind)
