"""Tokenize text once, for any number of runs."""

import sys

from lag_megatron.cli.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
