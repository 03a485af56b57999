"""What kernels in Triton share."""

import triton
import triton.language as tl


@triton.jit
def to_bf16(value):  # type: ignore[no-untyped-def]
    """The nearest bf16 of an fp32, ties to even, still in fp32: the interpreter's cast cuts off."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
