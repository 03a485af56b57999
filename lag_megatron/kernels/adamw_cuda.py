"""The one-pass AdamW in CUDA C++, built with nvcc on first use: for machines without Triton."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lag_megatron.errors import LagError

if TYPE_CHECKING:
    from lag_megatron.kernels.adamw import Rates

SOURCE = Path(__file__).with_name("adamw.cu")


def adamw_cuda(
    state: Sequence[Tensor], gradient: Tensor, weights: Tensor, numbers: Tensor, rates: "Rates"
) -> None:
    """Launch the update on the current stream.

    Args:
        state: fp32 master, first and second moment.
        gradient: flat, fp32 or bf16; what it lacks at the end is 0.
        weights: flat, fp32 or bf16.
        numbers: fp32 (3,): the gradient's scale, step size, second correction.
        rates: of this step.

    Raises:
        LagError: if the kernel cannot be built or launched.
    """
    error = _library().lag_adamw(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in state),
        ctypes.c_void_p(gradient.data_ptr()),
        gradient.dtype is torch.bfloat16,
        ctypes.c_void_p(weights.data_ptr()),
        weights.dtype is torch.bfloat16,
        ctypes.c_void_p(numbers.data_ptr()),
        ctypes.c_long(state[0].numel()),
        ctypes.c_long(gradient.numel()),
        *map(ctypes.c_float, (rates.lr * rates.weight_decay, *rates.betas, rates.eps)),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    if error:
        raise LagError(f"the CUDA kernel of AdamW could not be launched: CUDA error {error}.")


def compile_to(target: Path, architectures: Sequence[str]) -> None:
    """Build a shared library with code for architectures such as "90".

    Raises:
        LagError: if nvcc is missing or fails.
    """
    nvcc = nvcc_path()
    if nvcc is None:
        raise LagError(
            "nvcc: not found, so that AdamW's CUDA kernel cannot be built. Install Triton or the "
            "CUDA toolkit (CUDA_HOME), or set optimizer.one_pass: false."
        )
    command = [nvcc, "-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", str(SOURCE)]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise LagError(f"{SOURCE}: nvcc failed\n{done.stderr}")


def nvcc_path() -> str | None:
    """The CUDA compiler, by CUDA_HOME or the PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


@functools.cache
def _library() -> ctypes.CDLL:
    """The kernel for this device; built once a version of the source, whoever asks first."""
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "lag_megatron"))
    target = folder / f"lag_adamw_{architecture}_{digest}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            built = Path(draft) / target.name
            compile_to(built, [architecture])
            built.rename(target)  # ranks may build at the same time
    return ctypes.CDLL(str(target))
