"""One kernel for gathers and scatters of rows and columns: a copy through an index on one side.

Elements are moved as integers of their size, so every dtype keeps its bits.
"""

# Triton has no type information.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_indexed_kernel(  # noqa: PLR0913
    dst: tl.tensor,
    src: tl.tensor,
    indices: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    dst_row: tl.tensor,
    dst_col: tl.tensor,
    src_row: tl.tensor,
    src_col: tl.tensor,
    INDEX_ROWS: tl.constexpr,
    INDEX_SRC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
) -> None:
    """Copy a [rows, cols] window; `indices` replaces its row or column number in src or in dst."""
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    tile = tl.program_id(0)
    r = (tile // col_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = (tile % col_tiles).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_mask = r < rows
    col_mask = c < cols
    if INDEX_ROWS:
        far_r = tl.load(indices + r, mask=row_mask, other=0)
        far_c = c
    else:
        far_r = r
        far_c = tl.load(indices + c, mask=col_mask, other=0)
    if INDEX_SRC:
        from_offset = far_r[:, None] * src_row + far_c[None, :] * src_col
        to_offset = r[:, None] * dst_row + c[None, :] * dst_col
    else:
        from_offset = r[:, None] * src_row + c[None, :] * src_col
        to_offset = far_r[:, None] * dst_row + far_c[None, :] * dst_col
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(dst + to_offset, tl.load(src + from_offset, mask=mask, other=0), mask=mask)
