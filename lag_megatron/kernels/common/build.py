"""Compiling kernels in C++ and CUDA C++ on first use, and loading them with ctypes."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lag_megatron.config.installed import cache_dir
from lag_megatron.errors import LagError

_CPU_FLAGS = (
    "-O3", "-march=native", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-std=c++17",
    "-shared", "-fPIC", "-pthread",
)  # fmt: skip
_CUDA_BIN = "/usr/local/cuda/bin"
_X86_FLAGS = ("-mprefer-vector-width=512",)  # by default compilers take half of what AVX-512 has


def nvcc_path() -> str | None:
    """The CUDA compiler, by CUDA_HOME, by the PATH, or where NVIDIA's packages put it."""
    home = os.environ.get("CUDA_HOME")
    places = [*([f"{home}/bin"] if home else []), None, _CUDA_BIN]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def cpu_command() -> list[str]:
    """The command line of the C++ compiler.

    Raises:
        LagError: if there is none.
    """
    compiler = _cpu_compiler()
    if compiler is None:
        raise LagError(
            "g++: not found, so that AdamW's CPU kernel cannot be built. Install a C++ compiler "
            "(CXX), or set optimizer.one_pass: false."
        )
    return [*compiler, *_CPU_FLAGS, *(_X86_FLAGS if platform.machine() == "x86_64" else ())]


def builds_for_cpu() -> bool:
    """Whether a C++ compiler is installed; callers with another implementation use that if not."""
    return _cpu_compiler() is not None


@functools.cache
def _cpu_compiler() -> tuple[str, ...] | None:
    """The compiler and its own arguments: CXX, if that can be run."""
    given = tuple(shlex.split(os.environ.get("CXX", "")))
    if given and shutil.which(given[0]):
        return given
    found = shutil.which("g++") or shutil.which("clang++")
    return (found,) if found else None


def cuda_command(architectures: Sequence[str]) -> list[str]:
    """The command line of nvcc for architectures such as "90".

    Raises:
        LagError: if there is none.
    """
    nvcc = nvcc_path()
    if nvcc is None:
        raise LagError(
            "nvcc: not found, so that AdamW's CUDA kernel cannot be built. Install Triton or the "
            "CUDA toolkit (CUDA_HOME), or set optimizer.one_pass: false."
        )
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return [nvcc, "-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", *code]


def build(source: Path, command: Sequence[str], target: Path) -> None:
    """Compile ``source`` to ``target``, atomically.

    Raises:
        LagError: with the compiler's output.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        done = subprocess.run(
            [*command, str(source), "-o", str(built)], capture_output=True, text=True
        )
        if done.returncode:
            raise LagError(f"{source}: {command[0]} failed\n{done.stderr}")
        built.rename(target)  # ranks may build at the same time


@functools.cache
def load_library(source: Path) -> ctypes.CDLL:
    """The library of a kernel, from the cache if the same source and command were built before.

    Raises:
        LagError: if it cannot be compiled.
    """
    if source.suffix == ".cu":
        major, minor = torch.cuda.get_device_capability()
        command, machine = cuda_command([f"{major}{minor}"]), ""
    else:
        command, machine = cpu_command(), _instructions()
    headers = [header.read_text() for header in sorted(source.parent.glob("*.h"))]
    about = [source.read_text(), *headers, *command, machine]
    name = f"{source.stem}-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"
    default = cache_dir() / "torch_extensions"
    target = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default)) / "lag_megatron" / name
    if not target.exists():
        build(source, command, target)
    return ctypes.CDLL(str(target))


def data_pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's elements for a kernel; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _instructions() -> str:
    """The CPU's instruction sets: hosts of several kinds may share the cache."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
