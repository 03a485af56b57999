"""How a command ends that a user's error has stopped."""

import sys

from lag_megatron.errors import LagError

USER_ERROR = 2


def print_error(error: LagError) -> int:
    """Print the message, without a traceback, to stderr; returns the exit code."""
    print(error, file=sys.stderr)
    return USER_ERROR
