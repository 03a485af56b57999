"""Whether a file can be written, found out before the work that it is to hold."""

import os
from pathlib import Path

from lag_megatron.errors import LagError


def require_writable(
    file: Path, what: str, *, error: type[LagError], advice: str = "Name another file."
) -> None:
    """Refuse a file that cannot be written, without making it or its folder.

    Args:
        file: it and its folder need not exist.
        what: what it is to hold, or the option that names it.
        error: the kind of error to raise.
        advice: what to do, as a sentence.

    Raises:
        LagError: of the kind ``error``, if it is a folder, lies below a file, or in a folder that
            is read-only or forbidden to this user.
    """
    folder = file.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if file.is_dir():
        found = "it is a folder"
    elif not folder.is_dir():
        found = f"{folder} is not a folder"
    elif not os.access(folder, os.W_OK | os.X_OK):  # what replaces the file is made beside it
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        why = "lies on a read-only file system" if read_only else "is not writable for this user"
        found = f"{folder} {why}"
    else:
        return
    raise error(f"{file}: {what} cannot be written there: {found}. {advice}")
