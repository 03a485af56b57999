"""Which parts of a checkpoint are on the disk, while it is being written.

It is a file of lines beside them: what the checkpoint will be, then each part's files with their
checksums.  After a kill the same call goes on from it.
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
        folder: of the draft.
        done: manifest entries of each part's files, by the part's name.
    """

    folder: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def open(draft: Path, about: Mapping[str, Any], names: Collection[str]) -> "WriteProgress":
        """The record of an earlier call for the same, or a new one in an empty draft.

        Args:
            draft: its folder, which need not exist.
            about: tells one checkpoint from another.
            names: of its parts.
        """
        first = json.dumps({"about": about}, sort_keys=True)
        lines = _lines(draft / _NAME)
        record = WriteProgress(draft)
        if next(lines, None) == first:
            for line in lines:
                part = _parsed(line)
                if part and part["part"] in names and _is_there(draft, part["files"]):
                    record.done[part["part"]] = part["files"]
        else:
            manifest.remove_checkpoint(draft)
            draft.mkdir(parents=True)
        record._clear()
        text = [first, *(_line(name, files) for name, files in record.done.items())]
        (draft / _NAME).write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
        return record

    def _clear(self) -> None:
        """Remove what is half written, or of a part that is no more."""
        kept = {self.folder / name for name in self.entries()}
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()

    def note(self, name: str, files: Mapping[str, Any]) -> None:
        """Write down that a part's files are on disk."""
        with (self.folder / _NAME).open("a", encoding="utf-8") as file:
            file.write(f"{_line(name, files)}\n")
        self.done[name] = dict(files)

    def entries(self) -> dict[str, Any]:
        """Manifest entries of every file there is."""
        return {name: entry for files in self.done.values() for name, entry in files.items()}

    def close(self) -> None:
        """Remove it: everything is there."""
        (self.folder / _NAME).unlink()


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the record; None for one that a kill has cut."""
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
