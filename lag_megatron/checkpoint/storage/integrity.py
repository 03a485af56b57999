"""Whether the content of a checkpoint's files is what was written."""

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
    """What of a checkpoint is compared with its checksums.

    Attributes:
        rank: who looks.
        size: how many look, each at other files.
        states: which values will be read; None for all.
    """

    rank: int = 0
    size: int = 1
    states: Collection[str] | None = None

    def share(self, found: Iterable[T]) -> list[T]:
        """Which of these are the rank's to look at."""
        return list(found)[self.rank :: self.size]

    def damages(self, path: Path) -> Iterator[str]:
        """The damages that a committed directory's manifest shows, with the reason."""
        names = self.share(manifest.read_manifest(path)["files"])
        yield from manifest.find_corrupted_files(path, names, states=self.states)


EVERYTHING = VerifyScope()


def require_sound(
    path: Path, names: Collection[str] | None = None, *, states: Collection[str] | None = None
) -> None:
    """Refuse a tag directory with a file whose content is not what was written.

    Neither torch nor DeepSpeed compares content, so a flipped bit would load without a word.  Our
    own files are compared with their manifest; others' with the checksums that ``torch.save``
    keeps in each file.

    Args:
        path: the tag directory.
        names: the files to look at; all of them by default.
        states: the values to look at, where the manifest tells them apart; all by default.

    Raises:
        CheckpointError: naming every damaged file, or one that cannot be read.
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
    """Whether every byte of a tag directory has a checksum, so that no damage can hide."""
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
