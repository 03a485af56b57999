"""Where compilers keep what they built, so that probes and restarts find it again."""

import os
from collections.abc import MutableMapping
from pathlib import Path


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
