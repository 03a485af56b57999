"""The option of programs that write a target which another process could be writing."""

import argparse


def add_lock_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-lock``, which is ``lock`` among the parsed options."""
    parser.add_argument(
        "--no-lock",
        dest="lock",
        action="store_false",
        help="for file systems without locks: a second writer of the target is not noticed",
    )
