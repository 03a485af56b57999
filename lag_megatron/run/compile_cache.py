"""Where DeepSpeed, Triton and inductor cache builds; locks that killed builds left behind."""

import contextlib
import fcntl
import os
import time
from collections.abc import MutableMapping
from pathlib import Path

# A lock that is older belongs to a killed process: nothing that is built here takes longer.
_STALE_SECONDS = 90.0


def set_cache_dirs(cache: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the folders of DeepSpeed's, Triton's and inductor's builds, where none is set yet.

    They are read when torch or Triton is imported, or at the first build, so every process calls
    this before it imports torch.

    Args:
        cache: the folder that they are in; where TORCH_EXTENSIONS_DIR is set, they lie beside it.
        environment: is changed.
    """
    default = str(cache / "torch_extensions")
    beside = Path(environment.setdefault("TORCH_EXTENSIONS_DIR", default)).absolute().parent
    environment.setdefault("TRITON_CACHE_DIR", str(beside / "triton"))
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(beside / "inductor"))


def remove_stale_locks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove the lock files of processes that were killed while torch built an extension.

    torch marks a folder that is being built with a file ``lock``, and other processes wait until it
    is gone.  A killed process leaves it, and the next would wait for ever.  A lock that may still
    belong to a running build is waited for.
    """
    name = environment.get("TORCH_EXTENSIONS_DIR")
    if name is None or not Path(name).is_dir():
        return
    with (Path(name) / ".marks").open("w") as held:
        with contextlib.suppress(OSError):  # a file system without flock: locks still grow old
            fcntl.flock(held, fcntl.LOCK_EX)  # one rank at a time, or a new lock could be removed
        for lock in Path(name).glob("*/lock"):
            _wait_and_remove(lock)


def _wait_and_remove(lock: Path) -> None:
    """Wait until a lock is gone or stale; remove it if it is stale."""
    with contextlib.suppress(FileNotFoundError):
        while time.time() - lock.stat().st_mtime < _STALE_SECONDS:
            time.sleep(0.2)
        lock.unlink()
