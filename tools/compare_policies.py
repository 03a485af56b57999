#!/usr/bin/env python3
"""Compare growth policies at equal FLOPs: every arm, learning rate and seed of a study file."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lag_megatron.cli.compare_policies import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(root=ROOT))
