"""Whether the content of a checkpoint's files is what was written."""

from collections.abc import Collection, Iterator
from pathlib import Path

from lag_megatron.checkpoint import commit
from lag_megatron.checkpoint.zipcheck import damaged_records, has_checksums
from lag_megatron.errors import CheckpointError


def require_sound(path: Path, names: Collection[str] | None = None) -> None:
    """Refuse a tag directory with a file whose content is not what was written.

    Neither torch nor DeepSpeed compares content, so a flipped bit would load without a word.  Our
    own files are compared with their manifest; others' with the checksums that ``torch.save``
    keeps in each file.

    Args:
        path: the tag directory.
        names: the files to look at; all of them by default.

    Raises:
        CheckpointError: naming every damaged file, or one that cannot be read.
    """
    try:
        found = list(_damages(path, names))
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
    return commit.is_committed(path) or all(map(has_checksums, path.glob("*.pt")))


def _damages(path: Path, names: Collection[str] | None) -> Iterator[str]:
    if commit.is_committed(path):
        yield from commit.damages(path, names)
        return
    for name in sorted(p.name for p in path.glob("*.pt")) if names is None else sorted(names):
        for record in damaged_records(path / name):
            yield f"{name}: {record}: content differs from its checksum"
