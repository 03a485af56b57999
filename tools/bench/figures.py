"""The file a bench leaves: on which machine, when, and its figures by name."""

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
    """What the file says."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"machine": machine, "date": date, "figures": dict(figures)}
