"""Every Triton kernel compiles for GPUs without one, and moves memory in wide accesses."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# By kernel: its module, the types of its arguments, what they are fixed to, and the least number of
# 16-byte loads and stores that have to be in it.
_STATE = {name: "*fp32" for name in ("master_of", "exp_avg_of", "exp_avg_sq_of")}
_ADAMW = {
    **_STATE,
    "gradient_of": "*bf16",
    "weights_of": "*bf16",
    "numbers": "*fp32",
    "length": "i32",
    "gradient_length": "i32",
    **dict.fromkeys(("decay", "beta1", "beta2", "eps"), "fp32"),
    "BLOCK": "constexpr",
}
_ROWS = {"columns": "i32", "stride": "i32", "rows": "i32", "BLOCK": "constexpr"}
KERNELS = {
    "adamw": ("adamw_triton", "_adamw", _ADAMW, {"BLOCK": 1024}, 3),
    "grow": (
        "grow_triton",
        "_grow",
        {"rows": "*i64", "scales": "*fp32", "KIND": "constexpr", "BLOCK": "constexpr"},
        {"KIND": "bf16", "BLOCK": 4096},
        1,
    ),
    "statistics": (
        "softmax_triton",
        "_statistics",
        {"logits": "*bf16", "place": "*i64", "is_mine": "*i1", "found": "*fp32", **_ROWS},
        {"BLOCK": 4096},
        0,
    ),
    "gradient": (
        "softmax_triton",
        "_gradient",
        {"logits": "*bf16", "place": "*i64", "numbers": "*fp32", **_ROWS},
        {"BLOCK": 4096},
        0,
    ),
}
COMPILE = """
import importlib, json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, name, signature, fixed, capability = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module(f"lag_megatron.kernels.{module}"), name)
places = {argument: (place,) for place, argument in enumerate(signature)}
fixed = {places[n]: tl.bfloat16 if value == "bf16" else value for n, value in fixed.items()}
# As a launch finds them: tensors and lengths that are multiples of 16.
even = {places[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind[0] in "*i"}
source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=even)
target = GPUTarget("cuda", capability, 32)
print(json.dumps(triton.compile(source, target=target).asm["ptx"]))
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_compiles(kernel, capability, tmp_path):
    *what, wide = KERNELS[kernel]
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps([*what, capability])],
        capture_output=True,
        text=True,
        env=plain | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    ptx = json.loads(done.stdout.splitlines()[-1])
    assert f".target sm_{capability}" in ptx
    for way in ("ld.global", "st.global"):
        assert sum(way in line and ".v4." in line for line in ptx.splitlines()) >= wide
    if kernel == "grow":  # runs that are not aligned, or not of a multiple of four
        assert len(re.findall(r"st\.global\.b32", ptx)) >= 16
