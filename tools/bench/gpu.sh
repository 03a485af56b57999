#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command of at most ten minutes:
#
#   [PYTHON=python3] bash tools/bench/gpu.sh [--json FILE] [--only PART ...]
#
# PYTHON has to import what the project does (torch, deepspeed, megatron-core, tokenizers, pydantic,
# wandb, xxhash) and its tests (pytest, pytest-timeout, hypothesis); `make setup` is one way to get
# there.  By default it is .venv's, where there is one.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" tools/bench/gpu/run_all.py "$@"
