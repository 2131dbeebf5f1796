"""Kernels of cast_scale and accumulate."""

# Triton has no type information.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from lightning_superscale.ops.triton.kernels.bits import load_f32, store_rounded


@triton.jit
def cast_scale_kernel(
    dst: tl.tensor,
    src: tl.tensor,
    scale: tl.tensor,
    numel: tl.tensor,
    DST: tl.constexpr,
    SRC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    store_rounded(dst + index, load_f32(src + index, mask, SRC) * scale, mask, DST)


@triton.jit
def accumulate_kernel(
    acc: tl.tensor,
    delta: tl.tensor,
    scale: tl.tensor,
    numel: tl.tensor,
    ACC: tl.constexpr,
    DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    total = load_f32(acc + index, mask, ACC) + load_f32(delta + index, mask, DELTA) * scale
    store_rounded(acc + index, total, mask, ACC)
