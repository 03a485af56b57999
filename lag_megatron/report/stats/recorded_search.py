"""Recorded searches: the curves of one growth event in one file, for comparing rules on them."""

import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lag_megatron.atomic_io import write_file
from lag_megatron.errors import RunError
from lag_megatron.report.stats.growth import growth_data, growth_settings
from lag_megatron.report.stats.run_files import GrowthFiles, Json, RunFiles, finite, read_run
from lag_megatron.run.json_schema import require_schema
from lag_megatron.run.record_schema import RecordedEvent
from lag_megatron.small_files import read_json

DIGITS = 6
KEPT = ("step", "val_loss", "val_loss_batches", "ema_val_loss", "ema_val_loss_batches")
KEYS = ("name", "config", "pool", "base_val_loss", "curves")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedSearch:
    """One growth event as it was recorded.

    Attributes:
        name: what the search is called in print.
        growth: number of the event within its run.
        config: settings of the event, a configuration's ``growth`` section.
        pool: the candidates, as in ``pool.json``.
        base_val_loss: validation loss before growth, nats a token.
        curves: lines of each candidate's ``probe.jsonl``, steps counted from growth.
    """

    name: str
    growth: int
    config: Json
    pool: tuple[Json, ...]
    base_val_loss: float | None
    curves: Mapping[str, tuple[Json, ...]]


def read_search(path: Path) -> RecordedSearch:
    """Read a recorded search, ``.json`` or ``.json.gz``.

    Raises:
        RunError: if the file cannot be read or holds no recorded search.
    """
    if not path.exists():
        raise RunError(f"{path}: no such run directory or recorded search.")
    value = read_json(path, what="a recorded search", error=RunError)
    if any(key not in value for key in KEYS):
        raise RunError(f"{path}: not a recorded search, which has {', '.join(KEYS)}.")
    require_schema(value, RecordedEvent, where=path, what="a recorded search", error=RunError)
    try:
        return _search(value)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise RunError(f"{path}: not a recorded search: {error!r} is wrong or missing.") from None


def recorded_searches(run_dir: Path) -> list[RecordedSearch]:
    """The growth events of a run directory, finished or not.

    Raises:
        RunError: if it is no run directory or a file in it is damaged.
    """
    files = read_run(run_dir)
    return [search_of(files, growth) for growth in files.growths if growth.pool]


def record_search(run_dir: Path, growth: int) -> Json:
    """A growth event of a run directory as a recorded search, losses to 6 decimals.

    Raises:
        RunError: if the run has no such event or a file is damaged.
    """
    found = [search for search in recorded_searches(run_dir) if search.growth == growth]
    if not found:
        raise RunError(f"{run_dir}: has no growth event {growth}.")
    rounded: Json = _rounded(asdict(found[0]))
    return rounded


def write_search(run_dir: Path, growth: int, path: Path) -> None:
    """Write :func:`record_search` to a file, packed if its name ends in ``.gz``.

    Raises:
        RunError: if the run has no such event, a file is damaged or it cannot be written.
    """
    text = json.dumps(record_search(run_dir, growth), separators=(",", ":"), allow_nan=False)
    data = f"{text}\n".encode()
    write_file(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _search(value: Json) -> RecordedSearch:
    pool = tuple(dict(c) if isinstance(c, dict) else {"id": str(c)} for c in value["pool"])
    curves = {id_: tuple(dict(row) for row in rows) for id_, rows in value["curves"].items()}
    for candidate in pool:
        for row in curves.setdefault(candidate["id"], ()):
            if not isinstance(row["step"], int) or "val_loss" not in row:
                raise KeyError(f"{candidate['id']}: {row}")
    return RecordedSearch(
        name=str(value["name"]),
        growth=int(value.get("growth", 1)),
        config=dict(value["config"]),
        pool=pool,
        base_val_loss=finite(value["base_val_loss"]),
        curves=curves,
    )


def search_of(files: RunFiles, growth: GrowthFiles) -> RecordedSearch:
    """A growth event of a run as a search."""
    data = growth_data(files, growth)
    config = asdict(growth_settings(files, growth))
    del config["pool"]  # the candidates themselves stand beside it
    return RecordedSearch(
        name=str(files.run.get("name") or files.path.resolve().name),
        growth=growth.growth,
        config=config,
        pool=growth.pool,
        base_val_loss=data["base_val_loss"],
        curves={id_: _rows(rows) for id_, rows in growth.probes.items()},
    )


def _rows(rows: tuple[Json, ...]) -> tuple[Json, ...]:
    """The evaluations in order of steps; of a step written twice the later line counts."""
    kept = {row["step"]: {key: row[key] for key in KEPT if key in row} for row in rows}
    return tuple(kept[step] for step in sorted(kept))


def _rounded(value: Any) -> Any:
    """Floats to :data:`DIGITS` decimals; JSON has no NaN, so what is not finite becomes null."""
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
