"""A failure of W&B as one line, and of its log files as no more than that."""

import logging
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lag_megatron.errors import write_failure

_LONGEST = 300  # characters of a message of W&B's
_ADVICE = (
    "Make room there, or set WANDB_DIR to another folder that exists and is writable, before the "
    "next start. The run directory has everything that W&B shows."
)


def require_writable(folder: Path) -> None:
    """Make the folder that W&B writes; W&B itself would go on in the system's temporary folder.

    Raises:
        OSError: if nothing can be written there.
    """
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 12))
        file.flush()


def report_log_failures(report: Callable[[BaseException], object]) -> None:
    """Call ``report`` for each line that W&B's log files do not take.

    Otherwise ``logging`` prints a traceback for each of them.
    """
    logger = logging.getLogger("wandb")

    def handle_error(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            report(error)

    def add_handler(handler: logging.Handler) -> None:
        handler.handleError = handle_error  # type: ignore[method-assign]
        logging.Logger.addHandler(logger, handler)

    # W&B opens a log file in each call of init() and writes to it before it returns.
    logger.addHandler = add_handler  # type: ignore[method-assign,assignment]


def end_process() -> None:
    """End W&B's own process after a failure, which W&B would print once more when Python exits."""
    import wandb

    with suppress(Exception):  # the failure itself was told; this is what follows from it
        wandb.teardown(exit_code=1)


def describe_failure(error: BaseException, folder: Path) -> str:
    """What failed and what to do, in one line.

    Args:
        error: what was raised within W&B.
        folder: that W&B writes.
    """
    if isinstance(error, OSError) and error.errno is not None:
        reason, _ = write_failure(error)
        return f"{error.filename or folder}: {type(error).__name__}: {reason} {_ADVICE}"
    text = " ".join(str(error).split()) or "W&B's own process ended or does not answer."
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…"
    return f"{folder}: {type(error).__name__}: {text}"
