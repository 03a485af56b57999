"""The errors a user can cause, and so can mend.

Every message says what is wrong, where, what was found, what was expected and what to do.
Programs print the message without a traceback and exit with code 2.
"""

import errno
import unicodedata

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (*_FULL, errno.EROFS)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def printable(text: str) -> str:
    """``text`` with its control characters written as escapes, line breaks and tabs excepted.

    Names of files, tags and keys may hold any of them, and a terminal would obey them.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    # Spaces of other scripts, and characters newer than this Python's tables, are as good as any.
    if unicodedata.category(character) in ("Zs", "Cn", "Co"):
        return character
    return character.encode("unicode_escape").decode("ascii")


def sizes(*counts: int) -> list[str]:
    """Numbers of bytes as text, in the largest unit that shows a difference between them."""
    for unit, size in _UNITS:
        texts = [f"{count / size:,.1f} {unit}" for count in counts]
        if max(counts) >= size and len(set(texts)) == len(counts):
            return texts
    return [f"{count:,} bytes" for count in counts]


def write_failure(error: OSError | RuntimeError) -> tuple[str, str]:
    """Why something could not be written, and what to do about it, as two sentences.

    Args:
        error: what was raised; torch raises a RuntimeError when a disk is full.
    """
    if not isinstance(error, OSError) or error.errno is None:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        advice = "See that there is room, and run the same command again."
        return f"the disk is full or failed ({reason}).", advice
    number, reason = error.errno, f"{error.strerror or error}."
    if number in _FULL:
        return reason, "Free some space, or use another disk, and run the same command again."
    if number in _FORBIDDEN:
        return reason, "Make the place writable for this user, or name another one."
    if number == errno.ENOENT:
        return reason, (
            "Its folder was removed meanwhile. See that nothing else works there, and run the same "
            "command again."
        )
    return reason, "Mend that and run the same command again."


def unwritable(error: OSError, path: object = None) -> "RunError | None":
    """The message for an error that only writing raises: a full disk, a read-only place.

    Args:
        error: what was raised.
        path: what was written, where the error does not name it.

    Returns:
        None for an error of another kind.
    """
    if error.errno not in _UNWRITABLE:
        return None
    reason, advice = write_failure(error)
    return RunError(f"{error.filename or path}: cannot be written: {reason} {advice}")


class LagError(ValueError):
    """A mistake of the user or of the machine's state, as opposed to a bug.

    ``on_all_ranks`` says that every rank raises it, so that one message is enough.
    """

    on_all_ranks = False

    def __str__(self) -> str:
        return printable(super().__str__())


UserError = LagError  # the public name


class ConfigError(LagError):
    """The configuration is wrong or contradicts itself."""


class PlanError(LagError):
    """A growth that cannot be done as asked for."""


class CheckpointError(LagError):
    """A checkpoint that is missing, damaged, incomplete or not what was expected."""


class DataError(LagError):
    """The training text is missing, unreadable or too short."""


class RunError(LagError):
    """The run directory or the environment does not allow this run."""


class DeepSpeedVersionError(LagError):
    """The installed DeepSpeed lacks a private attribute that this project uses."""
