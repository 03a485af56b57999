"""The errors a user can cause, and so can mend.

Every message says what is wrong, where, what was found, what was expected and what to do.
Programs print the message without a traceback and exit with code 2.
"""


class LagError(ValueError):
    """A mistake of the user or of the machine's state, as opposed to a bug.

    ``on_all_ranks`` says that every rank raises it, so that one message is enough.
    """

    on_all_ranks = False


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
