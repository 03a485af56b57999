"""The errors a user can cause, and so can mend.

Every message says what is wrong, where, what was found, what was expected and what to do.
Programs print the message without a traceback and exit with code 2.
"""

import unicodedata


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
