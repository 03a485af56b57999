"""Take a checkpoint from one format to another, growing it on the way if asked."""

import sys

from lag_megatron.cli.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
