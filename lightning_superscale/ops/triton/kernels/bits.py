"""Loads and stores that round the same on a GPU and in Triton's interpreter.

bf16 travels as int16 bits and is widened and rounded with integers, because the interpreter's own conversion
to bf16 truncates. fp16 is rounded alike by both.
"""

# Triton has no type information.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

F32 = tl.constexpr(1)
BF16 = tl.constexpr(2)


@triton.jit
def narrow_bf16(x: tl.tensor) -> tl.tensor:
    """fp32 to bf16 bits (int16), nearest even; NaN becomes the quiet NaN 0x7fc0."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where(x != x, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def widen_bf16(bits: tl.tensor) -> tl.tensor:
    """bf16 bits (int16) to fp32, exactly."""
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load_f32(pointers: tl.tensor, mask: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """fp32 values of fp32, fp16 or (as int16) bf16 memory; 0 where masked off."""
    raw = tl.load(pointers, mask=mask, other=0)
    if DTYPE == BF16:
        return widen_bf16(raw)
    else:  # noqa: RET505  # Triton compiles only the branch that is taken
        return raw.to(tl.float32)


@triton.jit
def store_rounded(pointers: tl.tensor, x: tl.tensor, mask: tl.tensor, DTYPE: tl.constexpr) -> None:
    """Store fp32 values, rounded to nearest even, into fp32, fp16 or (as int16) bf16 memory."""
    if DTYPE == BF16:
        tl.store(pointers, narrow_bf16(x), mask=mask)
    elif DTYPE == F32:
        tl.store(pointers, x, mask=mask)
    else:
        tl.store(pointers, x.to(tl.float16), mask=mask)
