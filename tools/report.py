"""The report of a run, and other rules on its curves."""

import sys

from lag_megatron.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
