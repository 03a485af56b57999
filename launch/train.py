#!/usr/bin/env python3
"""Train, grow and probe a run.

deepspeed [--hostfile H | --num_gpus N] launch/train.py --config configs/demo.yaml

Also runs under torchrun and plain python (one rank).  The same command goes on after any
interruption.
"""

import sys

from lag_megatron.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
