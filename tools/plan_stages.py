"""Plan Staged Training: how long to train which size, and what that saves by the scaling law."""

import sys

from lag_megatron.cli.plan_stages import main

if __name__ == "__main__":
    sys.exit(main())
