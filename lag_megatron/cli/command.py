"""How every command ends: by a user's error, by Ctrl-C, or when nobody reads its output."""

import functools
import os
import signal
import sys
from collections.abc import Callable

from lag_megatron.errors import LagError, unwritable
from lag_megatron.process.output import discard, has_no_reader

USER_ERROR = 2
INTERRUPTED, OUTPUT_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE  # as shells count

Main = Callable[..., int]  # takes the arguments, by default those of the process
_AGAIN = "The same command starts anew."


def print_error(error: LagError) -> int:
    """Print the message, without a traceback, to stderr; returns the exit code."""
    print(error, file=sys.stderr)
    return USER_ERROR


def command(
    *, interrupted: str = _AGAIN, on_error: Callable[[LagError], int] = print_error
) -> Callable[[Main], Main]:
    """Make a function that runs a command into one that ends without tracebacks.

    It returns 2 after a user's error, 130 after Ctrl-C, and 141 where its output went to a
    program that reads no more of it, such as ``head``.

    Args:
        interrupted: what is left of the work after Ctrl-C, as a sentence.
        on_error: prints a user's error and returns the exit code.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                return _flushed(main, argv)
            except LagError as error:
                return on_error(error)
            except KeyboardInterrupt:
                _print_interrupted(interrupted)
                return INTERRUPTED
            except BrokenPipeError:
                if not has_no_reader(sys.stdout):
                    raise  # it was another pipe
                discard(sys.stdout)
                return OUTPUT_CLOSED

        return run

    return decorate


def exit_on_interrupt() -> None:
    """End with one line when Ctrl-C comes before a command begins, while modules are imported."""
    before = sys.excepthook

    def on_exception(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _print_interrupted("Nothing was begun.")
            os._exit(INTERRUPTED)
        before(kind, error, trace)  # type: ignore[arg-type]

    sys.excepthook = on_exception


def _flushed(main: Main, argv: list[str] | None) -> int:
    """What ``main`` returns, after its output was written."""
    try:
        try:
            return main(argv)
        finally:  # also after --help, which exits
            sys.stdout.flush()
    except OSError as error:
        found = unwritable(error, "standard output, or a file")
        if found is None:
            raise
        raise found from None


def _print_interrupted(what_is_left: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    if os.environ.get("RANK", "0") == "0":
        print(f"interrupted. {what_is_left}", file=sys.stderr, flush=True)
