"""What the parsers of all commands share: name, version, examples and shell completion."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import argcomplete

from lag_megatron import __version__
from lag_megatron.config.installed import list_configs

_PACKAGE = "lag_megatron.cli"
CONFIG_HELP = "YAML file, or the name of a configuration that comes with the package, e.g. demo"


def command_parser(
    description: str | None, arguments: str, *examples: str
) -> argparse.ArgumentParser:
    """A parser that knows ``--version``, and whose help ends with examples.

    Args:
        description: what the command does; its line breaks are kept.
        arguments: what has to be given, for the usage line.
        examples: command lines.
    """
    parser = argparse.ArgumentParser(
        prog=_program(),
        usage=f"%(prog)s [options] {arguments}".rstrip(),
        description=description,
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
    )
    parser.add_argument("--version", action="version", version=f"lag_megatron {__version__}")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, or complete it where a shell asks for that."""
    argcomplete.autocomplete(parser)
    return parser.parse_args(argv)


def add_list_configs(parser: argparse.ArgumentParser) -> None:
    """Add ``--list-configs``, which prints the configurations of the package and exits."""
    parser.add_argument("--list-configs", action=_ListConfigs, nargs=0, help="list them and exit")


class _ListConfigs(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        found = list(list_configs())
        width = max(len(name) for name, _ in found)
        for name, summary in found:
            print(f"{name:{width}}  {summary}")
        parser.exit()


def _program() -> str:
    """How the command was started: a console command, a program, or ``python -m MODULE``."""
    path = Path(sys.argv[0])
    if path.parent == Path(__file__).parent:
        return f"python -m {_PACKAGE}.{path.stem}"
    return path.name
