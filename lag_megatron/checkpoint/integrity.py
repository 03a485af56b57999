"""Whether the content of a checkpoint's files is what was written."""

from collections.abc import Collection
from pathlib import Path

from lag_megatron.checkpoint import commit
from lag_megatron.checkpoint.zipcheck import damaged_records
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
        CheckpointError: naming every damaged file.
    """
    if commit.is_committed(path):
        found = list(commit.damages(path, names))
    else:
        listed = sorted(p.name for p in path.glob("*.pt")) if names is None else sorted(names)
        found = [
            f"{name}: {record}: content differs from its checksum"
            for name in listed
            for record in damaged_records(path / name)
        ]
    if found:
        raise CheckpointError(
            f"{path}: damaged: {'; '.join(found[:3])}{' ...' if len(found) > 3 else ''}. "
            "Restore it from a copy, or use another tag."
        )
