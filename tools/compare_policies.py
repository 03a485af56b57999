"""Compare growth policies at equal FLOPs: every arm, learning rate and seed of a study file."""

import sys

from lag_megatron.cli.compare_policies import main

if __name__ == "__main__":
    sys.exit(main())
