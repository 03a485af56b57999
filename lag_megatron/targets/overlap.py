"""Targets that touch what they are made from: the same place, one inside of it, or around it."""

from pathlib import Path

from lag_megatron.errors import LagError, PlanError


def require_apart(target: Path, source: Path, *, error: type[LagError] = PlanError) -> None:
    """Check that writing a target changes nothing of its source.

    Symbolic links and ``..`` are followed, and directories that are mounted twice are one.

    Args:
        target: to be written; it need not exist.
        source: a file or directory that is read.
        error: what to raise.

    Raises:
        LagError: of the kind ``error``, if one is the other or lies within it.
    """
    there, here = target.resolve(), source.resolve()
    if _is_same(there, here):
        how = "is what is read"
    elif any(_is_same(parent, here) for parent in there.parents):
        how = "lies in what is read"
    elif any(_is_same(there, parent) for parent in here.parents):
        how = "holds what is read"
    else:
        return
    raise error(
        f"{target}: {how}, {source}, which is never changed. Name a target outside of it; "
        "nothing was written."
    )


def _is_same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))
