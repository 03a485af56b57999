"""The result file of a bench: the machine, the date and figures by name."""

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_figures(path: Path, figures: Mapping[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record(figures), indent=1))


def record(figures: Mapping[str, float]) -> dict[str, Any]:
    """The content of a result file."""
    machine = f"{_processor()}, {os.cpu_count()} cores"
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"machine": machine, "date": date, "figures": dict(figures)}


def _processor() -> str:
    """The processor's model name, followed by "with AMX" where it has matrix instructions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    about = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in about.items()}
    name = found.get("model name") or platform.machine()
    return f"{name} with AMX" if "amx_tile" in found.get("flags", "").split() else name
