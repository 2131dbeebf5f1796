"""colnorm, sumsq and count_nonfinite on CUDA tensors, in the oracle's order of additions."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_superscale.ops.reference import SUMSQ_BLOCK_NUMEL, SUMSQ_LANES
from lightning_superscale.ops.triton.launch import (
    DTYPE_CODES,
    ENABLE_FP_FUSION,
    as_kernel_input,
    on_device_of,
    require,
    require_flat,
    require_float,
)

_COLNORM_ROWS = 64  # rows of a block in the oracle's order of additions
_COLNORM_COLS = 128
_SUMSQ_TILE = 8
_COUNT_BLOCK = 4096


def colnorm(x: Tensor) -> Tensor:
    """Sum of squares of each column of x [R, C] of any strides; fp32 [C] on x's device."""
    require("colnorm", {"x": x})
    require_float("colnorm", "x", x)
    if x.dim() != 2:
        raise ValueError(f"colnorm: expected x [R, C], found shape {tuple(x.shape)}")
    from lightning_superscale.ops.triton.kernels.reductions import colnorm_blocks_kernel, colnorm_total_kernel

    rows, cols = x.shape
    out = torch.zeros(cols, device=x.device)
    if x.numel() == 0:
        return out
    blocks, col_tiles = -(-rows // _COLNORM_ROWS), -(-cols // _COLNORM_COLS)
    sums = torch.empty(blocks, cols, device=x.device)
    with on_device_of(x):
        colnorm_blocks_kernel[(blocks * col_tiles,)](
            as_kernel_input(x),
            sums,
            rows,
            cols,
            *x.stride(),
            DTYPE=DTYPE_CODES[x.dtype],
            BLOCK_ROWS=_COLNORM_ROWS,
            BLOCK_COLS=_COLNORM_COLS,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
        colnorm_total_kernel[(col_tiles,)](
            sums, out, cols, BLOCKS=blocks, BLOCK_COLS=_COLNORM_COLS, enable_fp_fusion=ENABLE_FP_FUSION
        )
    return out


def sumsq(x: Tensor) -> float:
    """Sum of squares in the fixed order of [Note: Sum of squares]; synchronises.

    The last additions, one per 4096 elements, are made on the host: in order and in double.
    """
    require("sumsq", {"x": x})
    require_flat("sumsq", {"x": x})
    from lightning_superscale.ops.triton.kernels.reductions import sumsq_blocks_kernel

    blocks = -(-x.numel() // SUMSQ_BLOCK_NUMEL)
    if blocks == 0:
        return 0.0
    sums = torch.empty(blocks, device=x.device)
    with on_device_of(x):
        sumsq_blocks_kernel[(-(-blocks // _SUMSQ_TILE),)](
            as_kernel_input(x),
            sums,
            x.numel(),
            blocks,
            DTYPE=DTYPE_CODES[x.dtype],
            BLOCK_NUMEL=SUMSQ_BLOCK_NUMEL,
            LANES=SUMSQ_LANES,
            TILE=_SUMSQ_TILE,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
    total = 0.0
    for block in sums.tolist():  # not sum(): Python 3.12 compensates its rounding
        total += block
    return total


def count_nonfinite(x: Tensor) -> int:
    """Number of NaN and infinite elements; synchronises."""
    require("count_nonfinite", {"x": x})
    require_flat("count_nonfinite", {"x": x})
    from lightning_superscale.ops.triton.kernels.reductions import count_nonfinite_kernel

    programs = -(-x.numel() // _COUNT_BLOCK)
    if programs == 0:
        return 0
    counts = torch.empty(programs, dtype=torch.int32, device=x.device)
    with on_device_of(x):
        count_nonfinite_kernel[(programs,)](
            as_kernel_input(x),
            counts,
            x.numel(),
            DTYPE=DTYPE_CODES[x.dtype],
            BLOCK=_COUNT_BLOCK,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
    return int(counts.sum())
