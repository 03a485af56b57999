"""The file a bench leaves: on which machine, when, and its figures by name."""

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path


def write_figures(path: Path, figures: Mapping[str, float]) -> None:
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "date": date, "figures": dict(figures)}, indent=1)
    path.write_text(text)
