"""Kernels of colnorm, sumsq and count_nonfinite, each in the oracle's order of additions."""

# Triton has no type information.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from lightning_superscale.ops.triton.kernels.bits import load_f32


@triton.jit
def colnorm_blocks_kernel(
    x: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
) -> None:
    """sums[b, c] = squares of rows [b * BLOCK_ROWS, ...) of column c, added in row order."""
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    block = (tl.program_id(0) // col_tiles).to(tl.int64)
    c = (tl.program_id(0) % col_tiles).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = c < cols
    total = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    first = block * BLOCK_ROWS
    row = x + first * row_stride + c * col_stride
    r = tl.zeros([BLOCK_COLS], dtype=tl.int64) + first
    for _ in range(BLOCK_ROWS):
        value = load_f32(row, mask & (r < rows), DTYPE)
        total = total + value * value
        row += row_stride
        r += 1
    tl.store(sums + block * cols + c, total, mask=mask)


@triton.jit
def colnorm_total_kernel(
    sums: tl.tensor, out: tl.tensor, cols: tl.tensor, BLOCKS: tl.constexpr, BLOCK_COLS: tl.constexpr
) -> None:
    """out[c] = sums[0, c] + sums[1, c] + ..., in order."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = c < cols
    total = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    row = sums + c
    for _ in range(BLOCKS):
        total = total + tl.load(row, mask=mask, other=0.0)
        row += cols
    tl.store(out + c, total, mask=mask)


@triton.jit
def sumsq_blocks_kernel(
    x: tl.tensor,
    sums: tl.tensor,
    numel: tl.tensor,
    blocks: tl.tensor,
    DTYPE: tl.constexpr,
    BLOCK_NUMEL: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The fp32 sum of each block of BLOCK_NUMEL, as in [Note: Sum of squares]; TILE blocks a program."""
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    lane = block[:, None] * BLOCK_NUMEL + tl.arange(0, LANES)[None, :]
    total = tl.zeros([TILE, LANES], dtype=tl.float32)
    for row in range(BLOCK_NUMEL // LANES):
        index = lane + row * LANES
        value = load_f32(x + index, index < numel, DTYPE)
        total = total + value * value
    # Each sum has two addends, so that lanes are added pairwise as in the note.
    eight = tl.sum(tl.reshape(total, [TILE, 2, 8]), axis=1)
    four = tl.sum(tl.reshape(eight, [TILE, 2, 4]), axis=1)
    two = tl.sum(tl.reshape(four, [TILE, 2, 2]), axis=1)
    tl.store(sums + block, tl.sum(two, axis=1), mask=block < blocks)


@triton.jit
def count_nonfinite_kernel(
    x: tl.tensor, counts: tl.tensor, numel: tl.tensor, DTYPE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """counts[program] = NaN and infinite elements among the program's BLOCK."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = load_f32(x + index, index < numel, DTYPE)
    bits = value.to(tl.int32, bitcast=True) & 0x7F800000
    tl.store(counts + tl.program_id(0), tl.sum((bits == 0x7F800000).to(tl.int32), axis=0))
