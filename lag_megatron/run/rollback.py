"""Going back to an earlier checkpoint: what came after it is moved away, not deleted."""

import json
import os
from pathlib import Path

from lag_megatron.atomic_io import write_file
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import RunError
from lag_megatron.run.directory import RunDirectory
from lag_megatron.run.journal import Journal


def roll_back(run: RunDirectory, tag: str) -> None:
    """Bring the run directory back to the moment when checkpoint ``tag`` had been saved.

    Later checkpoints, stages and growth events move to ``rewound/<n>/``, and the whole journal is
    kept there; the run's own is cut off after the checkpoint.

    Raises:
        RunError: if there is no such committed checkpoint.
    """
    checkpoint = _committed(run, tag)
    aside = _new_folder(run.root / "rewound")
    for path in _later(run, checkpoint):
        target = aside / path.relative_to(run.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
    manifest.point_latest(checkpoint)
    _cut_journal(run, checkpoint, aside)


def _committed(run: RunDirectory, tag: str) -> Path:
    there = [p for stage in sorted(run.root.glob("stage*")) for p in manifest.committed_tags(stage)]
    for path in there:
        if path.name == tag:
            manifest.check_sizes(path)
            return path
    names = ", ".join(path.name for path in there)
    raise RunError(
        f"--resume {tag}: no such committed checkpoint in {run.root}. There are: {names or 'none'}."
    )


def _later(run: RunDirectory, checkpoint: Path) -> list[Path]:
    stage = int(checkpoint.parent.name.removeprefix("stage"))
    later = [p for p in checkpoint.parent.glob("step*") if p.name > checkpoint.name]
    for kind in ("stage", "growth"):
        numbered = {int(p.name.removeprefix(kind)): p for p in run.root.glob(f"{kind}[0-9]*")}
        later += [path for number, path in sorted(numbered.items()) if number > stage]
    return later


def _cut_journal(run: RunDirectory, checkpoint: Path, aside: Path) -> None:
    """Last, so that a kill before it leaves a journal that names what is missing."""
    events = Journal(run.journal).events
    saved = [
        number
        for number, event in enumerate(events)
        if event["event"] == "checkpoint" and event["path"] == run.relative(checkpoint)
    ]
    if not saved:
        return  # killed between the checkpoint and its line: nothing came after
    os.link(run.journal, aside / run.journal.name)
    kept = events[: saved[-1] + 1]
    write_file(run.journal, "".join(json.dumps(event) + "\n" for event in kept))


def _new_folder(parent: Path) -> Path:
    parent.mkdir(exist_ok=True)
    number = sum(1 for _ in parent.iterdir())
    folder = parent / f"{number:02d}"
    folder.mkdir()
    return folder
