"""Grow a DeepSpeed checkpoint shard by shard, or move it to another number of ranks."""

import sys

from lag_megatron.cli.grow_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
