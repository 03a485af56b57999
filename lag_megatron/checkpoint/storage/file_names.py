"""Names that checkpoints give to their own files: none may lead elsewhere."""

from pathlib import PurePosixPath


def leads_out(name: str) -> bool:
    """Whether a name that a checkpoint gives to one of its files is not within its directory."""
    path = PurePosixPath(name)
    return not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name
