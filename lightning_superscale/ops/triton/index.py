"""Gathers and scatters of rows and columns on CUDA tensors.

Tensors have any strides and any dtype of 1, 2, 4 or 8 bytes; bits are copied. Indices must lie in range, are
not wrapped when negative and are not checked: that would make the host wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_superscale.ops.triton.launch import ENABLE_FP_FUSION, as_integers, on_device_of, require

_BLOCK_ROWS = 8
_BLOCK_COLS = 128


def rows_gather(dst: Tensor, src: Tensor, rows: Tensor) -> None:
    """`dst[i, :] = src[rows[i], :]`; src [R, C], dst [K, C] of one dtype, rows int64 [K]."""
    _copy("rows_gather", dst, src, rows, is_rows=True, is_gather=True)


def rows_scatter(dst: Tensor, src: Tensor, rows: Tensor) -> None:
    """`dst[rows[i], :] = src[i, :]`; dst [R, C], src [K, C] of one dtype, rows int64 [K], distinct."""
    _copy("rows_scatter", dst, src, rows, is_rows=True, is_gather=False)


def cols_gather(dst: Tensor, src: Tensor, cols: Tensor) -> None:
    """`dst[:, j] = src[:, cols[j]]`; src [R, C], dst [R, K] of one dtype, cols int64 [K]."""
    _copy("cols_gather", dst, src, cols, is_rows=False, is_gather=True)


def cols_scatter(dst: Tensor, src: Tensor, cols: Tensor) -> None:
    """`dst[:, cols[j]] = src[:, j]`; dst [R, C], src [R, K] of one dtype, cols int64 [K], distinct."""
    _copy("cols_scatter", dst, src, cols, is_rows=False, is_gather=False)


def _check(name: str, dst: Tensor, src: Tensor, indices: Tensor, window: Tensor, axis: int) -> None:
    if dst.dim() != 2 or src.dim() != 2 or dst.dtype != src.dtype:
        raise ValueError(
            f"{name}: expected dst and src 2D and of one dtype, found {tuple(dst.shape)} {dst.dtype} and "
            f"{tuple(src.shape)} {src.dtype}"
        )
    if indices.dtype != torch.int64 or indices.shape != window.shape[axis : axis + 1] or not indices.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous int64 indices of shape ({window.shape[axis]},), found {indices.dtype} "
            f"of shape {tuple(indices.shape)}"
        )
    if dst.shape[1 - axis] != src.shape[1 - axis]:
        raise ValueError(
            f"{name}: expected dst and src of one size in dim {1 - axis}, found {tuple(dst.shape)} and "
            f"{tuple(src.shape)}"
        )


def _copy(name: str, dst: Tensor, src: Tensor, indices: Tensor, *, is_rows: bool, is_gather: bool) -> None:
    require(name, {"dst": dst, "src": src, "indices": indices})
    window = dst if is_gather else src
    _check(name, dst, src, indices, window, axis=0 if is_rows else 1)
    from lightning_superscale.ops.triton.kernels.index import copy_indexed_kernel

    if window.numel() == 0:
        return
    rows, cols = window.shape
    with on_device_of(dst):
        copy_indexed_kernel[(-(-rows // _BLOCK_ROWS) * -(-cols // _BLOCK_COLS),)](
            as_integers(dst),
            as_integers(src),
            indices,
            rows,
            cols,
            *dst.stride(),
            *src.stride(),
            INDEX_ROWS=is_rows,
            INDEX_SRC=is_gather,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLS=_BLOCK_COLS,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
