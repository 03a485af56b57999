"""Downstream scores of a model, by lm-evaluation-harness on local files; no network is used."""

import sys

from lag_megatron.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
