"""Going back to an earlier checkpoint: what came after it is put aside, not deleted."""

import json
import os
from pathlib import Path

from lag_megatron.atomic_io import write_atomically
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import RunError
from lag_megatron.run.directory import RunDirectory
from lag_megatron.run.journal import Journal


def roll_back(run: RunDirectory, tag: str) -> None:
    """Make the run directory stand where it stood when checkpoint ``tag`` had been saved.

    Later checkpoints, stages, growth events and the journal's later part go to ``rewound/<n>/``.

    Raises:
        RunError: if there is no such committed checkpoint.
    """
    place = _place(run, tag)
    aside = _fresh_folder(run.root / "rewound")
    for path in _later(run, place):
        target = aside / path.relative_to(run.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
    manifest.point_latest(place)
    _cut_journal(run, place, aside)


def _place(run: RunDirectory, tag: str) -> Path:
    there = [p for stage in sorted(run.root.glob("stage*")) for p in manifest.committed_tags(stage)]
    for path in there:
        if path.name == tag:
            manifest.check_sizes(path)
            return path
    names = ", ".join(path.name for path in there)
    raise RunError(
        f"--resume {tag}: no such committed checkpoint in {run.root}. There are: {names or 'none'}."
    )


def _later(run: RunDirectory, place: Path) -> list[Path]:
    stage = int(place.parent.name.removeprefix("stage"))
    later = [p for p in place.parent.glob("step*") if p.name > place.name]
    for kind in ("stage", "growth"):
        numbered = {int(p.name.removeprefix(kind)): p for p in run.root.glob(f"{kind}[0-9]*")}
        later += [path for number, path in sorted(numbered.items()) if number > stage]
    return later


def _cut_journal(run: RunDirectory, place: Path, aside: Path) -> None:
    """Last, so that a kill before it leaves a journal that names what is missing."""
    events = Journal(run.journal).events
    saved = [
        number
        for number, event in enumerate(events)
        if event["event"] == "checkpoint" and event["path"] == run.relative(place)
    ]
    if not saved:
        return  # killed between the checkpoint and its line: nothing came after
    os.link(run.journal, aside / run.journal.name)
    kept = events[: saved[-1] + 1]
    write_atomically(run.journal, "".join(json.dumps(event) + "\n" for event in kept))


def _fresh_folder(parent: Path) -> Path:
    parent.mkdir(exist_ok=True)
    number = sum(1 for _ in parent.iterdir())
    folder = parent / f"{number:02d}"
    folder.mkdir()
    return folder
