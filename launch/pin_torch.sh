#!/usr/bin/env bash
# Print the constraints for the environment VENV: those of constraints.txt, except that an
# environment which brought its own torch keeps it.  Usage: pin_torch.sh VENV
set -euo pipefail
venv=$1
constraints=$(dirname "$0")/../constraints.txt

own=
if [ ! -e "$venv/.lag_megatron.torch" ]; then # setup leaves this file where torch came from it
  own=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' \
    2>/dev/null || true)
fi
if [ -z "$own" ]; then
  cat "$constraints"
else
  echo "setup: keeping torch $own of $venv" >&2
  grep -v '^torch==' "$constraints"
  echo "torch==$own"
fi
