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
    "adamw": ("triton.adamw_triton", "_adamw", _ADAMW, {"BLOCK": 1024}, 3),
    "grow": (
        "triton.grow_triton",
        "_grow",
        {"rows": "*i64", "scales": "*fp32", "KIND": "constexpr", "BLOCK": "constexpr"},
        {"KIND": "bf16", "BLOCK": 4096},
        1,
    ),
    "statistics": (
        "triton.softmax_triton",
        "_statistics",
        {"logits": "*bf16", "place": "*i64", "is_mine": "*i1", "found": "*fp32", **_ROWS},
        {"BLOCK": 4096},
        0,
    ),
    "gradient": (
        "triton.softmax_triton",
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

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def ptx_of(module, name, signature, fixed, capability, aligned=True):
    kernel = getattr(importlib.import_module(f"lag_megatron.kernels.{module}"), name)
    places = {argument: (place,) for place, argument in enumerate(signature)}
    fixed = {places[n]: TYPES.get(value, value) for n, value in fixed.items()}
    # As a launch finds them: tensors and lengths that are multiples of 16, or none that is.
    even = {places[n]: [["tt.divisibility", 16]] for n, k in signature.items() if k[0] in "*i"}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=fixed, attrs=even if aligned else {}
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


print(json.dumps([ptx_of(*each) for each in json.loads(sys.argv[1])]))
"""


def compiled(kernels, cache):
    """The kernels in PTX, by a process of its own: in this one Triton interprets."""
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(kernels)],
        capture_output=True,
        text=True,
        env=plain | {"TRITON_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_compiles(kernel, capability, tmp_path):
    *what, wide = KERNELS[kernel]
    (ptx,) = compiled([[*what, capability]], tmp_path)
    assert f".target sm_{capability}" in ptx
    for way in ("ld.global", "st.global"):
        assert sum(way in line and ".v4." in line for line in ptx.splitlines()) >= wide
    if kernel == "grow":  # runs that are not aligned, or not of a multiple of four
        assert len(re.findall(r"st\.global\.b32", ptx)) >= 16


def variants():
    """Every type, aligned or not; lengths of one, which Triton makes constants."""
    types = ("bf16", "fp16", "fp32")
    for aligned in (True, False):
        for kind in types:
            module, name, signature, fixed, _ = KERNELS["grow"]
            yield [module, name, signature, fixed | {"KIND": kind}, 90, aligned]
            for kernel in ("statistics", "gradient"):
                module, name, signature, fixed, _ = KERNELS[kernel]
                yield [module, name, signature | {"logits": f"*{kind}"}, fixed, 90, aligned]
            module, name, signature, fixed, _ = KERNELS["adamw"]
            for weights in types:
                mixed = {"gradient_of": f"*{kind}", "weights_of": f"*{weights}"}
                yield [module, name, signature | mixed, fixed, 90, aligned]
    for kernel, lengths in (
        ("adamw", ("length", "gradient_length")),
        ("statistics", ("columns", "stride", "rows")),
        ("gradient", ("columns", "stride", "rows")),
    ):
        module, name, signature, fixed, _ = KERNELS[kernel]
        constants = signature | dict.fromkeys(lengths, "constexpr")
        yield [module, name, constants, fixed | dict.fromkeys(lengths, 1), 90, True]


def test_every_type_and_alignment_compiles(tmp_path):
    wanted = list(variants())
    assert len(compiled(wanted, tmp_path)) == len(wanted) == 2 * 3 * 6 + 3
