"""Say what a checkpoint holds and whether it is sound: exit 0 if it is, 1 if not."""

import sys

from lag_megatron.cli.inspect_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
