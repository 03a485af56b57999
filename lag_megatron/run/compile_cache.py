"""Where compilers keep what they built, so that probes and restarts find it again."""

import contextlib
import fcntl
import os
import time
from collections.abc import MutableMapping
from pathlib import Path

# After so many seconds a mark is a killed process's: nothing that is built here takes longer.
_STALE_SECONDS = 90.0


def keep_caches(root: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Name the folders of DeepSpeed's, Triton's and inductor's builds, where none is named yet.

    They are read at the import of torch, of Triton or at the first build, so this comes first, in
    every process, whatever started it.

    Args:
        root: what ``.cache/torch_extensions`` is below, unless TORCH_EXTENSIONS_DIR is set; the
            others lie beside that.
        environment: is changed.
    """
    default = str(root / ".cache" / "torch_extensions")
    beside = Path(environment.setdefault("TORCH_EXTENSIONS_DIR", default)).absolute().parent
    environment.setdefault("TRITON_CACHE_DIR", str(beside / "triton"))
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(beside / "inductor"))


def clear_marks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove what processes that were killed while torch built something have left behind.

    torch marks a folder as being built by a file, and whoever finds one waits until it is gone.  A
    process that is killed leaves it, and the same command would wait for ever.  A mark that is not
    old enough to be such a one is waited for.
    """
    name = environment.get("TORCH_EXTENSIONS_DIR")
    if name is None or not Path(name).is_dir():
        return
    with (Path(name) / ".marks").open("w") as held:
        with contextlib.suppress(OSError):  # a file system without locks: marks still grow old
            fcntl.flock(held, fcntl.LOCK_EX)  # or another rank's new mark could be taken for it
        for mark in Path(name).glob("*/lock"):
            _outlive(mark)


def _outlive(mark: Path) -> None:
    """Wait until whoever made a mark has removed it, or is taken for dead."""
    with contextlib.suppress(FileNotFoundError):
        while time.time() - mark.stat().st_mtime < _STALE_SECONDS:
            time.sleep(0.2)
        mark.unlink()
