"""Move a DeepSpeed checkpoint to another number of ranks."""

import sys

from lag_megatron.cli.respread_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
