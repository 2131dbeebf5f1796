"""Sums, casts, accumulation, gather, scatter and copies of CPU tensors, with the bits of `reference.py`.

Tensors are contiguous; ops over elements take any shape and compare numel only. With `pool=None` small tensors
run in the calling thread and large ones in `default_pool()`; the calling thread waits without the GIL.
"""

from __future__ import annotations

from ctypes import byref, c_double, c_int64

import torch
from torch import Tensor

from lightning_superscale.ops import reference
from lightning_superscale.ops.cpu.pool import Pool, Ticket, default_pool
from lightning_superscale.ops.native import loader
from lightning_superscale.ops.types import GRAD_DTYPES

# At most this many bytes are handled in the calling thread.
INLINE_BYTES = 256 * 1024


def sumsq(x: Tensor, *, pool: Pool | None = None) -> float:
    """Sum of squares of x (fp32, bf16, fp16), in the order of [Note: Sum of squares] in `reference.py`."""
    _check_float("sumsq: x", x)
    lib = loader.native()
    if lib is None:
        return reference.sumsq(x)
    result = c_double()
    code = loader.DTYPE_CODES[x.dtype]
    handle = _pool_handle(pool, x.nbytes)
    loader.check(lib, lib.lss_sumsq(handle, x.data_ptr(), code, x.numel(), byref(result), None, None))
    return result.value


def count_nonfinite(x: Tensor, *, pool: Pool | None = None) -> int:
    """Number of NaN and infinite elements of x (fp32, bf16, fp16)."""
    _check_float("count_nonfinite: x", x)
    lib = loader.native()
    if lib is None:
        return reference.count_nonfinite(x)
    result = c_int64()
    code = loader.DTYPE_CODES[x.dtype]
    handle = _pool_handle(pool, x.nbytes)
    loader.check(lib, lib.lss_count_nonfinite(handle, x.data_ptr(), code, x.numel(), byref(result), None, None))
    return result.value


def cast_scale(dst: Tensor, src: Tensor, scale: float = 1.0, *, pool: Pool | None = None) -> None:
    """`dst = src.float() * scale`, rounded to nearest even; each of fp32, bf16, fp16.

    dst may be src's own memory when both have the same element size.
    """
    _check_pair("cast_scale", "dst", dst, "src", src, may_be_same=dst.element_size() == src.element_size())
    lib = loader.native()
    if lib is None:
        reference.cast_scale(dst, src, scale)
        return
    status = lib.lss_cast_scale(
        _pool_handle(pool, dst.nbytes + src.nbytes),
        dst.data_ptr(),
        loader.DTYPE_CODES[dst.dtype],
        src.data_ptr(),
        loader.DTYPE_CODES[src.dtype],
        dst.numel(),
        scale,
        None,
        None,
    )
    loader.check(lib, status)


def accumulate(acc: Tensor, delta: Tensor, scale: float = 1.0, *, pool: Pool | None = None) -> None:
    """`acc += delta.float() * scale` in fp32, rounded once into acc's dtype; each of fp32, bf16, fp16."""
    _check_pair("accumulate", "acc", acc, "delta", delta, may_be_same=acc.dtype == delta.dtype)
    lib = loader.native()
    if lib is None:
        reference.accumulate(acc, delta, scale)
        return
    status = lib.lss_accumulate(
        _pool_handle(pool, acc.nbytes + delta.nbytes),
        acc.data_ptr(),
        loader.DTYPE_CODES[acc.dtype],
        delta.data_ptr(),
        loader.DTYPE_CODES[delta.dtype],
        acc.numel(),
        scale,
        None,
        None,
    )
    loader.check(lib, status)


def rows_gather(dst: Tensor, src: Tensor, rows: Tensor, *, pool: Pool | None = None) -> None:
    """`dst[i, :] = src[rows[i], :]`; src [R, C], dst [K, C] of one dtype, rows int64 [K]."""
    _check_selection("rows_gather", dst, src, rows, chosen=dst, whole=src, dim=0)
    lib = loader.native()
    if lib is None:
        reference.rows_gather(dst, src, rows)
        return
    row_bytes = dst.shape[1] * dst.element_size()
    handle = _pool_handle(pool, dst.nbytes)
    status = lib.lss_rows_gather(
        handle, dst.data_ptr(), src.data_ptr(), rows.data_ptr(), rows.numel(), row_bytes, None, None
    )
    loader.check(lib, status)


def rows_scatter(dst: Tensor, src: Tensor, rows: Tensor, *, pool: Pool | None = None) -> None:
    """`dst[rows[i], :] = src[i, :]`; dst [R, C], src [K, C] of one dtype, rows int64 [K], distinct."""
    _check_selection("rows_scatter", dst, src, rows, chosen=src, whole=dst, dim=0)
    lib = loader.native()
    if lib is None:
        reference.rows_scatter(dst, src, rows)
        return
    row_bytes = src.shape[1] * src.element_size()
    handle = _pool_handle(pool, src.nbytes)
    status = lib.lss_rows_scatter(
        handle, dst.data_ptr(), src.data_ptr(), rows.data_ptr(), rows.numel(), row_bytes, None, None
    )
    loader.check(lib, status)


def cols_gather(dst: Tensor, src: Tensor, cols: Tensor, *, pool: Pool | None = None) -> None:
    """`dst[:, j] = src[:, cols[j]]`; src [R, C], dst [R, K] of one dtype, cols int64 [K]."""
    _check_selection("cols_gather", dst, src, cols, chosen=dst, whole=src, dim=1)
    lib = loader.native()
    if lib is None:
        reference.cols_gather(dst, src, cols)
        return
    status = lib.lss_cols_gather(
        _pool_handle(pool, dst.nbytes),
        dst.data_ptr(),
        src.data_ptr(),
        cols.data_ptr(),
        cols.numel(),
        src.shape[0],
        src.shape[1],
        src.element_size(),
        None,
        None,
    )
    loader.check(lib, status)


def cols_scatter(dst: Tensor, src: Tensor, cols: Tensor, *, pool: Pool | None = None) -> None:
    """`dst[:, cols[j]] = src[:, j]`; dst [R, C], src [R, K] of one dtype, cols int64 [K], distinct."""
    _check_selection("cols_scatter", dst, src, cols, chosen=src, whole=dst, dim=1)
    lib = loader.native()
    if lib is None:
        reference.cols_scatter(dst, src, cols)
        return
    status = lib.lss_cols_scatter(
        _pool_handle(pool, src.nbytes),
        dst.data_ptr(),
        src.data_ptr(),
        cols.data_ptr(),
        cols.numel(),
        dst.shape[0],
        dst.shape[1],
        src.element_size(),
        None,
        None,
    )
    loader.check(lib, status)


def colnorm(x: Tensor, *, pool: Pool | None = None) -> Tensor:
    """Sum of squares of each column of x [R, C] (fp32, bf16, fp16), fp32 [C]."""
    _check_float("colnorm: x", x)
    if x.dim() != 2:
        raise ValueError(f"colnorm: x: expected a 2D tensor, found shape {tuple(x.shape)}")
    lib = loader.native()
    if lib is None:
        return reference.colnorm(x)
    result = torch.empty(x.shape[1])
    code = loader.DTYPE_CODES[x.dtype]
    handle = _pool_handle(pool, x.nbytes)
    status = lib.lss_colnorm(handle, x.data_ptr(), code, x.shape[0], x.shape[1], result.data_ptr(), None, None)
    loader.check(lib, status)
    return result


def submit_copy(
    dst: Tensor, src: Tensor, *, pool: Pool | None = None, priority: int = 0, held: bool = False
) -> Ticket[None]:
    """Submit `dst = src`, byte for byte and of one dtype and numel, to the pool and return at once.

    Arguments are those of `submit_adamw_commit`.
    """
    _check_tensor("submit_copy: dst", dst)
    _check_tensor("submit_copy: src", src)
    if dst.dtype != src.dtype or dst.numel() != src.numel():
        raise ValueError(
            f"submit_copy: expected one dtype and numel, found dst {dst.dtype} [{dst.numel()}] and src {src.dtype} "
            f"[{src.numel()}]: use cast_scale to convert"
        )
    _check_overlap("submit_copy", "dst", dst, "src", src, may_be_same=False)
    lib = loader.native()
    if lib is None:
        return Ticket(run=lambda: reference.copy(dst, src), held=held)
    pool = pool or default_pool()
    how = loader.SubmitStruct(priority, int(held))
    ticket: Ticket[None] = Ticket(lib=lib, keep=(pool, dst, src), run=lambda: None)
    status = lib.lss_copy(pool.handle, dst.data_ptr(), src.data_ptr(), src.nbytes, byref(how), ticket.slot())
    loader.check(lib, status)
    return ticket


def _pool_handle(pool: Pool | None, nbytes: int) -> int | None:
    """The native handle of the pool to run in; None for the calling thread."""
    if pool is None and nbytes <= INLINE_BYTES:
        return None
    return (pool or default_pool()).handle


def _check_tensor(where: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{where}: expected a CPU tensor, found one on {tensor.device}: copy it to host memory first")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{where}: expected a contiguous tensor, found shape {tuple(tensor.shape)} with stride {tensor.stride()}: "
            "call .contiguous(), and copy the result back if the op writes to it"
        )


def _check_float(where: str, tensor: Tensor) -> None:
    _check_tensor(where, tensor)
    if tensor.dtype not in GRAD_DTYPES:
        raise TypeError(f"{where}: expected torch.float32, torch.bfloat16 or torch.float16, found {tensor.dtype}")


def _check_pair(op: str, out_name: str, out: Tensor, in_name: str, read: Tensor, *, may_be_same: bool) -> None:
    _check_float(f"{op}: {out_name}", out)
    _check_float(f"{op}: {in_name}", read)
    if out.numel() != read.numel():
        raise ValueError(f"{op}: expected equal numel, found {out_name} {out.numel()} and {in_name} {read.numel()}")
    _check_overlap(op, out_name, out, in_name, read, may_be_same=may_be_same)


def _check_overlap(op: str, out_name: str, out: Tensor, in_name: str, read: Tensor, *, may_be_same: bool) -> None:
    out_start, read_start = out.data_ptr(), read.data_ptr()
    if may_be_same and out_start == read_start:
        return
    if out_start < read_start + read.nbytes and read_start < out_start + out.nbytes:
        raise ValueError(f"{op}: {out_name} and {in_name} overlap in memory: use separate tensors")


def _check_selection(
    op: str, dst: Tensor, src: Tensor, index: Tensor, *, chosen: Tensor, whole: Tensor, dim: int
) -> None:
    """`chosen` [K, C] (dim 0) or [R, K] (dim 1) is the selection from, or for, `whole` [R, C]."""
    for name, tensor in (("dst", dst), ("src", src), ("index", index)):
        _check_tensor(f"{op}: {name}", tensor)
    if index.dtype != torch.int64 or index.dim() != 1:
        raise TypeError(f"{op}: expected a 1D int64 index, found {index.dtype} of shape {tuple(index.shape)}")
    expected = (index.numel(), whole.shape[1]) if dim == 0 and whole.dim() == 2 else None
    if dim == 1 and whole.dim() == 2:
        expected = (whole.shape[0], index.numel())
    if dst.dtype != src.dtype or expected is None or tuple(chosen.shape) != expected:
        raise ValueError(
            f"{op}: expected 2D tensors of one dtype, the selection of shape {expected}, found {chosen.dtype} "
            f"{tuple(chosen.shape)} from {whole.dtype} {tuple(whole.shape)} with {index.numel()} indices"
        )
    if dst.element_size() > 8:
        raise TypeError(f"{op}: expected elements of at most 8 bytes, found {dst.dtype}")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= whole.shape[dim]):
        raise IndexError(
            f"{op}: expected indices from 0 to {whole.shape[dim] - 1}, found {int(index.min())} to {int(index.max())}"
        )
    _check_overlap(op, "dst", dst, "src", src, may_be_same=False)
