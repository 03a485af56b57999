"""The files of a run directory as plain values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lag_megatron.config import GrowthConfig, RunConfig, load_config, parse_growth
from lag_megatron.errors import RunError
from lag_megatron.run.directory import (
    DAMAGED_RUN,
    DECISION,
    FACTS,
    POOL,
    SEARCH_SETTINGS,
    read_decision,
    read_facts,
    read_pool,
)
from lag_megatron.run.journal import read_journal
from lag_megatron.run.metrics import read_rows
from lag_megatron.run.record_schema import CurveRow
from lag_megatron.run.resolved_config import as_journalled
from lag_megatron.small_files import read_json

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """Everything a report is made from, as read; missing files are empty."""

    path: Path
    config: RunConfig
    run: Json
    metrics: tuple[Json, ...]
    journal: tuple[Json, ...]
    growths: tuple["GrowthFiles", ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchFiles:
    """The directory of a search by ask and tell, which has one growth event and no run around it.

    ``settings`` are the event's; ``base`` is the checkpoint that candidates grow from.
    """

    path: Path
    settings: GrowthConfig
    base: str
    journal: tuple[Json, ...]
    growths: tuple["GrowthFiles", ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthFiles:
    """The folder of one growth event.

    ``decision`` is None until it is made; ``scores`` holds the candidates that were evaluated.
    """

    growth: int
    pool: tuple[Json, ...]
    probes: dict[str, tuple[Json, ...]]
    decision: Json | None
    scores: dict[str, Json]


def read_run(run_dir: Path) -> RunFiles:
    """Read a run directory, finished or not.

    Raises:
        RunError: if it is no run directory or a file in it is damaged.
        ConfigError: if its configuration does not hold.
    """
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such run directory. Expected e.g. runs/demo.")
    if not (run_dir / "config.yaml").is_file():
        raise RunError(
            f"{run_dir}: not a run directory, config.yaml is missing. Give the folder that "
            "launch/train.py wrote to, e.g. runs/demo."
        )
    journal = tuple(read_journal(run_dir / "journal.jsonl"))
    return RunFiles(
        path=run_dir,
        config=as_journalled(load_config(run_dir / "config.yaml"), journal),
        run=read_facts(run_dir) if (run_dir / FACTS).exists() else {},
        metrics=tuple(read_rows(run_dir / "metrics.jsonl")),
        journal=journal,
        growths=tuple(_growths(run_dir)),
    )


def is_search(directory: Path) -> bool:
    """Whether a directory is that of a search by ask and tell."""
    return (directory / SEARCH_SETTINGS).is_file()


def read_search_files(directory: Path) -> SearchFiles:
    """Read the directory of a search by ask and tell, decided or not.

    Raises:
        RunError: if a file in it is damaged.
        ConfigError: if its settings do not hold.
    """
    file = directory / SEARCH_SETTINGS
    search = read_json(file, what="the settings of a search", error=RunError, advice=DAMAGED_RUN)
    if not isinstance(search.get("growth"), dict) or not isinstance(search.get("base"), str):
        raise RunError(f"{file}: has no settings of a growth, or no base. {DAMAGED_RUN}")
    return SearchFiles(
        path=directory,
        settings=parse_growth(search["growth"], source=str(file)),
        base=search["base"],
        journal=tuple(read_journal(directory / "journal.jsonl")),
        growths=tuple(_growths(directory)),
    )


def finite(value: object) -> float | None:
    """The number, or None for what is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _growths(run_dir: Path) -> Iterator[GrowthFiles]:
    for folder in sorted(path.parent for path in run_dir.glob(f"growth*/{POOL}")):
        number = folder.name.removeprefix("growth")
        if not number.isdecimal():
            continue
        pool = read_pool(folder)
        folders = {candidate["id"]: folder / candidate["id"] for candidate in pool}
        yield GrowthFiles(
            growth=int(number),
            pool=tuple(pool),
            probes={id_: _curve(place) for id_, place in folders.items()},
            decision=read_decision(folder) if (folder / DECISION).exists() else None,
            scores={
                id_: found
                for id_, place in folders.items()
                if (found := _object(place / "scores.json")) is not None
            },
        )


def _curve(folder: Path) -> tuple[Json, ...]:
    return tuple(read_rows(folder / "probe.jsonl", CurveRow))


def _object(path: Path) -> Json | None:
    if not path.exists():
        return None
    value: Json = read_json(path, what="a run's file", error=RunError, advice=DAMAGED_RUN)
    return value
