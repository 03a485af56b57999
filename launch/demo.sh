#!/usr/bin/env bash
# The demo on two ranks of this machine.  Options of launch/train.py may follow.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v deepspeed >/dev/null || PATH=$PWD/.venv/bin:$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}
exec deepspeed --num_gpus 2 launch/train.py --config configs/demo.yaml "$@"
