"""Standard output and standard error when the program that reads them has ended."""

import os
import select
from typing import TextIO


def print_at_once(text: str, stream: TextIO) -> None:
    """Print a line; once nobody reads the stream, lines go nowhere.

    Ctrl-C ends the ``tee`` of ``lag-train ... | tee log`` first, and the run has still to save.
    """
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        discard(stream)


def has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reading end is closed."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not a file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard(stream: TextIO) -> None:
    """Let a stream go nowhere, so that nothing fails on it, now or when Python exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
