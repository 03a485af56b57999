"""A log of the parts of a checkpoint that are on the disk, while it is being written.

``.parts.jsonl`` lies in the staging directory: a first line with the checkpoint's metadata, then a
line for each finished part with its files' manifest entries.  After a kill the same call reads it
and writes only the parts that are missing.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.storage import manifest

_NAME = ".parts.jsonl"


@dataclass(frozen=True)
class WriteProgress:
    """Parts that are on the disk.

    Attributes:
        folder: the staging directory.
        done: manifest entries of each part's files, by the part's name.
    """

    folder: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def open(staging: Path, metadata: Mapping[str, Any], names: Collection[str]) -> "WriteProgress":
        """Go on from the log of an earlier call for the same checkpoint, or begin a new one.

        Files that no finished part has are deleted.

        Args:
            staging: the staging directory, which need not exist.
            metadata: entries of the manifest that tell one checkpoint from another.
            names: of the parts.
        """
        first = json.dumps({"about": metadata}, sort_keys=True)
        lines = _lines(staging / _NAME)
        progress = WriteProgress(staging)
        if next(lines, None) == first:
            for line in lines:
                part = _parsed(line)
                if part and part["part"] in names and _is_there(staging, part["files"]):
                    progress.done[part["part"]] = part["files"]
        else:
            manifest.remove_checkpoint(staging)
            staging.mkdir(parents=True)
        progress._clear()
        text = [first, *(_line(name, files) for name, files in progress.done.items())]
        (staging / _NAME).write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
        return progress

    def _clear(self) -> None:
        """Delete half-written files and those of parts that are not wanted any more."""
        kept = {self.folder / name for name in self.entries()}
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()

    def mark_done(self, name: str, files: Mapping[str, Any]) -> None:
        """Log that a part's files are on the disk."""
        with (self.folder / _NAME).open("a", encoding="utf-8") as file:
            file.write(f"{_line(name, files)}\n")
        self.done[name] = dict(files)

    def entries(self) -> dict[str, Any]:
        """Manifest entries of all files of finished parts."""
        return {name: entry for files in self.done.values() for name, entry in files.items()}

    def close(self) -> None:
        """Delete the log when all parts are there."""
        (self.folder / _NAME).unlink()


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the log; None for one that a kill has cut short."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"part", "files"} <= found.keys() else None


def _line(name: str, files: Mapping[str, Any]) -> str:
    return json.dumps({"part": name, "files": dict(files)})


def _is_there(folder: Path, files: Mapping[str, Any]) -> bool:
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["size"]
        for name, entry in files.items()
    )
