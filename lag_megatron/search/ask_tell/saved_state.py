"""The state that a training program has saved for a trial, in a layout of its own."""

from pathlib import Path
from typing import Any

from lag_megatron.atomic_io import flush_to_disk
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.search.ask_tell.trial import Trial


def saved_files(folder: Path) -> dict[str, Any]:
    """Flush all files below a folder to disk; the manifest's entry of each, by relative name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / manifest.MANIFEST)
    entries = {str(path.relative_to(folder)): manifest.file_entry(path) for path in files}
    for path in (p for p in folder.rglob("*") if p.is_dir()):
        flush_to_disk(path)
    return entries


def commit_state(state: Path, files: dict[str, Any], *, step: int, trial: Trial) -> None:
    """Commit what lies in a trial's ``save_dir`` as ``state``.

    Args:
        state: the folder that it becomes.
        files: the result of :func:`saved_files`.
        step: optimizer steps that the state has seen, those of the base included.
        trial: that was trained.
    """
    metadata = {"step": step, "candidate": trial.id, "plan": trial.plan.to_json()}
    manifest.commit(state, files=files, metadata=metadata, pointer=None)
