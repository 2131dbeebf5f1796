"""AdamW and gradient statistics on CUDA tensors, bit for bit as on the CPU.

Names and meanings are those of `ops/reference.py`, except that on a GPU:

- Work is enqueued on the current stream of the tensors' device, and nothing waits for it. Statistics
  come back as `DeviceGradStats`; only its `to_host` and the functions `sumsq` and `count_nonfinite` synchronise.
- Tensors are used on the current stream only, so the caching allocator keeps their memory in order by
  itself. For a tensor that belongs to another stream the caller waits for that stream and calls
  `record_stream`, as with any torch op.
- Overlap between segments is not checked.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_superscale.ops.cuda import abi as abi
from lightning_superscale.ops.cuda.capability import LEAST_FOR_CUDA, why_too_old
from lightning_superscale.ops.types import (
    GRAD_DTYPES,
    STATE_DTYPES,
    WEIGHT_DTYPES,
    AdamWHyper,
    AdamWSegment,
    GradStats,
)

_BLOCK_NUMEL = 4096  # the block of [Note: Sum of squares] in ops/reference.py


@dataclass(frozen=True, slots=True)
class DeviceGradStats:
    """One `GradStats` per segment or tensor, still on the device and perhaps not computed yet.

    Attributes:
        raw: int64 [n, 2]: the bits of the float64 sum of squares, then the non-finite count.
    """

    raw: Tensor

    @property
    def sumsq(self) -> Tensor:
        """Sums of squares, float64 [n]: a view."""
        return self.raw.view(torch.float64)[:, 0]

    @property
    def nonfinite(self) -> Tensor:
        """Counts of elements that are NaN or infinite, int64 [n]: a view."""
        return self.raw[:, 1]

    def to_host(self) -> list[GradStats]:
        """The statistics, copied to the host; synchronises with the current stream of the device."""
        host = self.raw.cpu()
        sums = host.view(torch.float64)[:, 0].tolist()
        return [GradStats(total, count) for total, count in zip(sums, host[:, 1].tolist(), strict=True)]


@functools.cache
def _find() -> abi.CudaLibrary | str:
    """The library, or the reason in words why there is none."""
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: this needs an NVIDIA GPU, its driver and a CUDA build of PyTorch"
    too_old = why_too_old(LEAST_FOR_CUDA, "the CUDA kernels")
    if too_old is not None:
        return too_old
    candidates = abi.candidate_paths()
    path = next((p for p in candidates if os.path.isfile(p)), None)
    if path is None:
        return (
            f"{abi.LIBRARY_NAME} was not found beside the package, in site-packages or in the build cache; reinstall "
            f"with nvcc on the PATH, or set {abi.LIBRARY_ENV} to the file"
        )
    try:
        library = abi.open_library(path)
        # No segments: nothing is launched, but a driver older than the library's runtime says so here.
        library.check(
            library.dll.lss_cuda_adamw(ctypes.byref(abi.Call(device=torch.cuda.current_device())), None), "load"
        )
    except (OSError, RuntimeError) as error:
        return str(error)
    return library


def unavailable_reason() -> str | None:
    """Why the functions of this module cannot run here, or None if they can."""
    found = _find()
    return found if isinstance(found, str) else None


def _library() -> abi.CudaLibrary:
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(f"the CUDA ops cannot run: {found}")
    return found


def _check(
    tensor: Tensor, where: str, name: str, dtypes: Sequence[torch.dtype], numel: int, device: torch.device
) -> None:
    # Names are joined only for a message: this runs for every tensor of every call.
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{where}{name}: expected dtype {' or '.join(map(str, dtypes))}, found {tensor.dtype}; cast it first"
        )
    if tensor.device != device:
        raise ValueError(
            f"{where}{name}: expected a tensor on {device}, found {tensor.device}; all of a call is on one device"
        )
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != numel:
        raise ValueError(
            f"{where}{name}: expected a contiguous 1D tensor of {numel} elements, found shape {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}; pass a flat view of the same run of elements as param"
        )


def _device_of(tensor: Tensor, where: str, library: abi.CudaLibrary) -> torch.device:
    if tensor.device.type != library.device_type:
        raise ValueError(
            f"{where}: expected a {library.device_type} tensor, found one on {tensor.device}; "
            "use the CPU op of the same name there"
        )
    return tensor.device


def _scalar_pointer(tensor: Tensor | None, name: str, device: torch.device) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or tensor.numel() != 1 or tensor.device != device:
        raise ValueError(
            f"{name}: expected one float32 element on {device}, found {tensor.dtype} of shape {tuple(tensor.shape)} "
            f"on {tensor.device}"
        )
    return tensor.data_ptr()


def _check_unscaled(hyper: AdamWHyper, name: str, where: str) -> None:
    if hyper.grad_scale != 1.0:
        raise ValueError(
            f"{where}: {name} is given as a device scalar, so the segment's own must be 1.0, found {hyper.grad_scale}; "
            "put the whole product into the device scalar"
        )


def _shared_scale(segments: Sequence[AdamWSegment], name: str) -> Tensor | None:
    """The one device_scale of all segments, since a launch reads one; None where they have none."""
    first = segments[0].device_scale
    for index, seg in enumerate(segments):
        if seg.device_scale is not first:
            raise ValueError(
                f"{name}: segment {index}.device_scale: expected the tensor of segment 0, found another; a call has one"
            )
        if first is not None:
            _check_unscaled(seg.hyper, "device_scale", f"{name}: segment {index}")
    return first


def _fill(out: abi.Segment, seg: AdamWSegment, mode: int, where: str, device: torch.device) -> None:
    """Check one segment and write it into its struct."""
    numel = seg.param.numel()
    if seg.rounding is not None:
        raise ValueError(f"{where}.rounding: expected None, found {seg.rounding}: ops.triton.adamw_low rounds states")
    _check(seg.param, where, ".param", (torch.float32,), numel, device)
    _check(seg.exp_avg, where, ".exp_avg", STATE_DTYPES, numel, device)
    _check(seg.exp_avg_sq, where, ".exp_avg_sq", STATE_DTYPES, numel, device)
    _check(seg.grad, where, ".grad", GRAD_DTYPES, numel, device)
    out.param, out.exp_avg, out.exp_avg_sq = seg.param.data_ptr(), seg.exp_avg.data_ptr(), seg.exp_avg_sq.data_ptr()
    out.grad, out.numel = seg.grad.data_ptr(), numel
    out.exp_avg_dtype = abi.DTYPE_CODES[seg.exp_avg.dtype]
    out.exp_avg_sq_dtype = abi.DTYPE_CODES[seg.exp_avg_sq.dtype]
    out.grad_dtype = abi.DTYPE_CODES[seg.grad.dtype]
    out.hyper = abi.to_struct(seg.hyper)
    if seg.weight_out is not None:
        _check(seg.weight_out, where, ".weight_out", WEIGHT_DTYPES, numel, device)
        out.weight_out, out.weight_out_dtype = seg.weight_out.data_ptr(), abi.DTYPE_CODES[seg.weight_out.dtype]
    elif mode != abi.COMMIT:
        raise ValueError(f"{where}.weight_out: expected a tensor, found None; a peek writes nothing else")
    if mode == abi.COMMIT_PEEK:
        if seg.next_grad is None or seg.next_hyper is None:
            raise ValueError(f"{where}: expected next_grad and next_hyper, found None; use adamw_commit without them")
        _check(seg.next_grad, where, ".next_grad", GRAD_DTYPES, numel, device)
        out.next_grad, out.next_grad_dtype = seg.next_grad.data_ptr(), abi.DTYPE_CODES[seg.next_grad.dtype]
        out.next_hyper = abi.to_struct(seg.next_hyper)


def _allocate_stats(numels: Sequence[int], device: torch.device) -> tuple[abi.StatsOut, DeviceGradStats, list[Tensor]]:
    """Room for statistics; the list holds the scratch alive until the call is enqueued."""
    num_blocks = sum(-(-numel // _BLOCK_NUMEL) for numel in numels)
    raw = torch.empty(len(numels), 2, dtype=torch.int64, device=device)
    scratch = [torch.empty(num_blocks, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)]
    out = abi.StatsOut(scratch[0].data_ptr(), scratch[1].data_ptr(), raw.data_ptr(), num_blocks)
    return out, DeviceGradStats(raw), scratch


def _adamw(
    name: str,
    mode: int,
    segments: Sequence[AdamWSegment],
    stats: bool,
    grad_scale: Tensor | None,
    next_grad_scale: Tensor | None,
    skip: Tensor | None,
) -> DeviceGradStats | None:
    library = _library()
    if not segments:
        return DeviceGradStats(torch.empty(0, 2, dtype=torch.int64)) if stats else None
    device = _device_of(segments[0].param, f"{name}: segment 0.param", library)
    array = (abi.Segment * len(segments))()
    for index, seg in enumerate(segments):
        where = f"{name}: segment {index}"
        _fill(array[index], seg, mode, where, device)
        if grad_scale is not None:
            _check_unscaled(seg.hyper, "grad_scale", where)
        if next_grad_scale is not None and seg.next_hyper is not None:
            _check_unscaled(seg.next_hyper, "next_grad_scale", where)
    if grad_scale is None:
        grad_scale = _shared_scale(segments, name)
    call = abi.Call(
        segments=array,
        num_segments=len(segments),
        mode=mode,
        device=device.index or 0,
        grad_scale=_scalar_pointer(grad_scale, f"{name}: grad_scale", device),
        next_grad_scale=_scalar_pointer(next_grad_scale, f"{name}: next_grad_scale", device),
        skip=_scalar_pointer(skip, f"{name}: skip", device),
    )
    seen: DeviceGradStats | None = None
    scratch: list[Tensor] = []
    if stats:
        call.stats_out, seen, scratch = _allocate_stats([seg.param.numel() for seg in segments], device)
    library.check(library.dll.lss_cuda_adamw(ctypes.byref(call), library.stream_of(device)), name)
    del scratch  # freed in stream order: only later work of this stream can get the memory
    return seen


def adamw_commit(
    segments: Sequence[AdamWSegment],
    *,
    stats: bool = False,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> DeviceGradStats | None:
    """Apply `grad` to param, exp_avg, exp_avg_sq in place; write `weight_out` if present.

    Args:
        segments: segments on one CUDA device, with an fp32 `param` and no `rounding`; 48 share a launch.
        stats: whether to return statistics of the scaled gradients.
        grad_scale: one fp32 element on the device, in place of every segment's `hyper.grad_scale`
            (which must be 1): a clip coefficient that the host need not see.
        skip: one fp32 element on the device. Unless it is 0 (NaN is not), the gradients are dropped:
            param and moments stay and `weight_out` is the rounded param. The host must learn of a skip
            before the next update, whose step number depends on it.
    """
    return _adamw("adamw_commit", abi.COMMIT, segments, stats, grad_scale, None, skip)


def adamw_peek(
    segments: Sequence[AdamWSegment],
    *,
    stats: bool = False,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> DeviceGradStats | None:
    """Write to `weight_out` the values that `adamw_commit` would write, and change nothing else.

    Arguments are those of `adamw_commit`.
    """
    return _adamw("adamw_peek", abi.PEEK, segments, stats, grad_scale, None, skip)


def adamw_commit_peek(
    segments: Sequence[AdamWSegment],
    *,
    stats: bool = False,
    grad_scale: Tensor | None = None,
    next_grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> DeviceGradStats | None:
    """Commit `grad`, then peek `next_grad` from the state as stored; `stats` and `skip` are those of `next_grad`.

    `grad` is committed whatever `skip` says: the caller has accepted it before.

    Args:
        next_grad_scale: one fp32 element on the device, in place of every segment's `next_hyper.grad_scale`.
    """
    return _adamw("adamw_commit_peek", abi.COMMIT_PEEK, segments, stats, grad_scale, next_grad_scale, skip)


def _tensor_array(
    name: str, tensors: Sequence[Tensor], library: abi.CudaLibrary
) -> tuple[ctypes.Array[abi.TensorStruct], torch.device]:
    device = _device_of(tensors[0], f"{name}: tensor 0", library)
    array = (abi.TensorStruct * len(tensors))()
    for index, tensor in enumerate(tensors):
        _check(tensor, name, f": tensor {index}", GRAD_DTYPES, tensor.numel(), device)
        array[index] = abi.TensorStruct(tensor.data_ptr(), tensor.numel(), abi.DTYPE_CODES[tensor.dtype], 0)
    return array, device


def grad_stats(tensors: Sequence[Tensor], *, scale: float = 1.0) -> DeviceGradStats:
    """Sum of squares and non-finite count of each `tensor * scale`, without synchronising.

    Args:
        tensors: contiguous 1D tensors of fp32, bf16 or fp16, on one CUDA device; 48 share a launch.
    """
    library = _library()
    if not tensors:
        return DeviceGradStats(torch.empty(0, 2, dtype=torch.int64))
    array, device = _tensor_array("grad_stats", tensors, library)
    out, seen, scratch = _allocate_stats([tensor.numel() for tensor in tensors], device)
    error = library.dll.lss_cuda_sumsq(
        array, len(tensors), scale, ctypes.byref(out), device.index or 0, library.stream_of(device)
    )
    library.check(error, "grad_stats")
    del scratch
    return seen


def sumsq(x: Tensor) -> float:
    """Sum of squares of a 1D tensor, in the fixed order of [Note: Sum of squares]; synchronises."""
    return grad_stats([x]).to_host()[0].sumsq


def count_nonfinite(x: Tensor) -> int:
    """Number of NaN and infinite elements; synchronises."""
    library = _library()
    array, device = _tensor_array("count_nonfinite", [x], library)
    count = torch.empty(1, dtype=torch.int64, device=device)
    error = library.dll.lss_cuda_count_nonfinite(
        array, 1, count.data_ptr(), device.index or 0, library.stream_of(device)
    )
    library.check(error, "count_nonfinite")
    return int(count.item())
