#!/usr/bin/env bash
# Build, once, the communication op that DeepSpeed compiles at its first start without a GPU.
set -euo pipefail
python - <<'PY'
import torch

if not torch.cuda.is_available():
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    builder = ShareMemCommBuilder()
    if builder.is_compatible():
        builder.load(verbose=False)
PY
