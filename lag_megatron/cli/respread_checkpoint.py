"""Move a DeepSpeed checkpoint to another number of ranks or ZeRO stage, without growing it.

The tensor-parallel size and the precision may change too; what is not given stays as in the source.
No process ever holds the model.  DeepSpeed's own loader takes the result.
"""

import argparse
import sys

from lag_megatron.cli.command import command
from lag_megatron.cli.grow_checkpoint import run
from lag_megatron.cli.growth_options import add_places, add_topology_options
from lag_megatron.cli.parser import command_parser, parse

# Options of a growth that the shared code asks for.
_NO_GROWTH = {
    **dict.fromkeys(("operator", "layers", "moments", "seed", "init_std", "names", "plan")),
    **{"set": (), "link": False},
}


@command(interrupted="The same command goes on from here.")
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write; 2 for a user's error."""
    return run(parse(_parser(), argv))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        "SOURCE TARGET",
        "lag-respread ckpt moved --world-size 64",
        "lag-respread ckpt moved --world-size 8 --zero-stage 3 --tensor-parallel 2",
    )
    add_places(parser)
    add_topology_options(parser)
    parser.set_defaults(**_NO_GROWTH)
    return parser


if __name__ == "__main__":
    sys.exit(main())
