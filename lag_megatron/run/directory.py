"""The run directory: paths, the lock of the one job that writes there, and its settings."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from lag_megatron.atomic_io import write_file
from lag_megatron.config import RunConfig, dump_config, load_config
from lag_megatron.errors import ConfigError, RunError, printable
from lag_megatron.run.json_schema import require_schema
from lag_megatron.run.record_schema import Decision, PoolEntry, RunFacts
from lag_megatron.small_files import read_json
from lag_megatron.targets.file_lock import lock_file

# What may differ between two starts of one run: nothing that changes its numbers beyond rounding.
_FREE_KEYS = (
    "tracking",
    "checkpoint",
    "parallel.tensor",
    "parallel.zero_stage",
    "parallel.micro_batch",
    "parallel.world_size",
    "parallel.timeout",
    "parallel.sequence_parallel",
    "parallel.recompute",
    "growth.probe_groups",
    "growth.rung_timeout",
    "stages.*.growth.probe_groups",
    "stages.*.growth.rung_timeout",
)
# In the directory of a search by ask and tell, what it was begun with; it has no ``config.yaml``.
SEARCH_SETTINGS = "search.json"
FACTS, DECISION, POOL = "run.json", "decision.json", "pool.json"
DAMAGED_RUN = "Restore it from a copy, or start a new run directory."
_LOCK_TIMEOUT_SECONDS = 40


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths inside ``runs/<name>``."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    @property
    def journal(self) -> Path:
        """Events, one JSON object a line."""
        return self.root / "journal.jsonl"

    @property
    def metrics(self) -> Path:
        """Metrics, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def data_cache(self) -> Path:
        """Tokenized text, shared by the runs beside this one."""
        return self.root.parent / ".cache" / "data"

    def stage(self, stage: int) -> Path:
        """Checkpoints of a stage."""
        return self.root / f"stage{stage:02d}"

    def growth(self, growth: int) -> Path:
        """Pool, probes and decision of a growth event; event 1 is before stage 1."""
        return self.root / f"growth{growth:02d}"

    def probe(self, growth: int, candidate: str) -> Path:
        """Curve and states of one candidate."""
        return self.growth(growth) / candidate

    def relative(self, path: Path) -> str:
        """A path as the journal names it: within the run directory, or else the path as it is."""
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)


def tag_of(step: int) -> str:
    """Name of the checkpoint after ``step`` optimizer steps; names sort by step."""
    return f"step{step:08d}"


def step_of(tag: str) -> int:
    """Number of optimizer steps in a checkpoint's name."""
    return int(tag.removeprefix("step"))


def acquire(run: RunDirectory) -> IO[str]:
    """Lock the run directory; the lock is held while the returned file is open.

    Waits for a job that is just ending.

    Raises:
        RunError: if another job goes on writing there, or nothing can be written there.
    """
    path = run.root / "lock"

    def refusal(holder: str) -> str:
        return (
            f"{path}: the run is being written by {holder}. Wait for it, stop it, or give "
            "another --run-dir."
        )

    try:
        return lock_file(path, timeout=_LOCK_TIMEOUT_SECONDS, refusal=refusal)
    except OSError as error:
        raise RunError(
            f"{run.root}: cannot be written: {error.strerror or error}. A run goes on only where "
            "it can write: copy the directory, and give the copy as --run-dir."
        ) from None


def claim(run: RunDirectory, config: RunConfig) -> None:
    """Write the configuration to the run directory, or check it against the one there.

    Raises:
        RunError: if it belongs to a run with other settings, or to one whose settings are lost.
    """
    path = run.root / "config.yaml"
    if not path.exists():
        if run.journal.exists():
            raise RunError(
                f"{path}: missing, but {run.journal.name} says that a run was begun there, whose "
                "settings it held. Restore it from a copy, or give another --run-dir."
            )
        write_file(path, dump_config(config))
        return
    try:
        before = load_config(path)
    except ConfigError as error:
        raise RunError(
            f"{path}: the run there cannot be continued by this version: {error}"
        ) from None
    if changed := sorted(_differences(before, config)):
        raise RunError(
            f"{run.root}: holds a run with other settings: {', '.join(changed)}. Give another "
            "--run-dir, restore the settings, or remove the directory to start anew."
        )
    write_file(path, dump_config(config))


def read_facts(root: Path) -> dict[str, Any]:
    """What ``run.json`` says of a run: its text, its tokenizer, its sizes.

    Raises:
        RunError: if the file is missing or damaged.
    """
    facts: dict[str, Any] = _checked(root / FACTS, RunFacts, "the facts of a run")
    return facts


def read_decision(growth: Path) -> dict[str, Any]:
    """The decision in the folder of a growth event.

    Raises:
        RunError: if the file is missing or damaged.
    """
    path, what = growth / DECISION, "a growth event's decision"
    decision: dict[str, Any] = _checked(path, Decision, what)
    if decision["chosen"] not in [candidate["id"] for candidate in decision["candidates"]]:
        raise RunError(
            f"{path}: expected {what}, but {decision['chosen']!r} was chosen, which is none of its "
            f"candidates. {DAMAGED_RUN}"
        )
    return decision


def read_pool(growth: Path) -> list[dict[str, Any]]:
    """The candidates in the folder of a growth event.

    Raises:
        RunError: if the file is missing or damaged.
    """
    path, what = growth / POOL, "a list of candidates"
    pool: list[dict[str, Any]] = _checked(path, list[PoolEntry], what)
    ids = [candidate["id"] for candidate in pool]
    for candidate in pool:
        found = ""
        if ids.count(candidate["id"]) > 1:
            found = "stands there twice"
        elif any(o["source"] >= candidate["source_layers"] for o in candidate["layer_map"]):
            found = "takes a layer from above the model's last"
        elif len(candidate["layer_map"]) != candidate["target_layers"]:
            found = "has another number of layers than its target_layers"
        elif not _is_name(candidate["id"]):
            found = "is no name of a folder"
        if found:
            raise RunError(
                f"{path}: expected {what}, but {candidate['id']!r} {found}. {DAMAGED_RUN}"
            )
    return pool


def _is_name(text: str) -> bool:
    return bool(text) and text not in (".", "..") and "/" not in text and printable(text) == text


def _checked(path: Path, schema: Any, what: str) -> Any:
    value = read_json(path, what=what, error=RunError, advice=DAMAGED_RUN, shape=None)
    return require_schema(value, schema, where=path, what=what, error=RunError, advice=DAMAGED_RUN)


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file so that a reader never sees a part of it."""
    write_file(path, json.dumps(value, indent=1))


def _differences(before: RunConfig, after: RunConfig) -> Iterator[str]:
    yield from _unequal(_tree(before), _tree(after), "")


def _tree(config: RunConfig) -> dict[str, Any]:
    """Plain values; a stage without settings of its own growth has the global ones."""
    from pydantic import TypeAdapter

    tree: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config)
    stages = tree["stages"]
    tree["stages"] = [{**stage, "growth": stage["growth"] or tree["growth"]} for stage in stages]
    return tree


def _unequal(before: Any, after: Any, path: str) -> Iterator[str]:
    """What differs, with its dotted path, before and after."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            inner = f"{path}.{key}".lstrip(".")
            if not any(fnmatch(inner, free) for free in _FREE_KEYS):
                yield from _unequal(before.get(key), after.get(key), inner)
    elif _are_lists(before, after) and any(isinstance(item, dict) for item in (*before, *after)):
        for number, (old, new) in enumerate(zip_longest(before, after)):
            yield from _unequal(old, new, f"{path}.{number}")
    elif before != after:
        yield f"{path} ({_shown(before)} there, {_shown(after)} now)"


def _are_lists(*values: Any) -> bool:
    return all(isinstance(value, list | tuple) for value in values)


def _shown(value: Any) -> str:
    """A value of the configuration; of a mapping the plain settings that are given."""
    if not isinstance(value, dict):
        return "nothing" if value is None else repr(value)
    plain = {k: v for k, v in value.items() if v is not None and not isinstance(v, dict)}
    return "{" + ", ".join(f"{k}: {v}" for k, v in plain.items()) + "}"
