"""Verification of a checkpoint's files against their checksums."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.torch_zip import damaged_records, has_checksums
from lag_megatron.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VerifyScope:
    """Which part of a checkpoint this rank verifies.

    Attributes:
        rank: this rank.
        size: ranks that verify, each other files.
        states: the states that will be read; None for all.
    """

    rank: int = 0
    size: int = 1
    states: Collection[str] | None = None

    def share(self, found: Iterable[T]) -> list[T]:
        """The items that this rank verifies."""
        return list(found)[self.rank :: self.size]

    def find_corrupted_files(self, path: Path) -> Iterator[str]:
        """Yield this rank's files that differ from the directory's manifest, with reasons."""
        names = self.share(manifest.read_manifest(path)["files"])
        yield from manifest.find_corrupted_files(path, names, states=self.states)


EVERYTHING = VerifyScope()


def require_sound(
    path: Path, names: Collection[str] | None = None, *, states: Collection[str] | None = None
) -> None:
    """Check the content of a tag directory's files.

    Neither torch nor DeepSpeed does, so a flipped bit would load unnoticed.  Committed directories
    are compared with their manifest, others with the CRC32 that ``torch.save`` keeps in each file.

    Args:
        path: the tag directory.
        names: the files to compare; all by default.
        states: the states to compare, where the manifest has a checksum for each; all by default.

    Raises:
        CheckpointError: naming the corrupted files, or one that cannot be read.
    """
    try:
        found = list(_find_corruption(path, names, states))
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot read: {error.strerror or error}. "
            "Restore it from a copy, or use another tag."
        ) from None
    if found:
        raise CheckpointError(
            f"{path}: damaged: {'; '.join(found[:3])}{' ...' if len(found) > 3 else ''}. "
            "Restore it from a copy, or use another tag."
        )


def is_verifiable(path: Path) -> bool:
    """Whether every byte of a tag directory has a checksum."""
    return manifest.is_committed(path) or all(map(has_checksums, path.glob("*.pt")))


def _find_corruption(
    path: Path, names: Collection[str] | None, states: Collection[str] | None
) -> Iterator[str]:
    if manifest.is_committed(path):
        yield from manifest.find_corrupted_files(path, names, states=states)
        return
    for name in sorted(p.name for p in path.glob("*.pt")) if names is None else sorted(names):
        for record in damaged_records(path / name):
            yield f"{name}: {record}: content differs from its checksum"
