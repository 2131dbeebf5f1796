"""AdamW and Adam on the CPU: one pass over memory per call, over any number of segments.

Semantics are those of `reference.py`, bit for bit (a NaN's payload excepted): commit applies a gradient, peek
only computes the weights that a commit would give, commit_peek commits one gradient and peeks the next. The
`submit_*` functions return at once; until the ticket is done, no tensor of a segment may be written, and none
that the op writes may be read.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; order of operations of torch.optim.AdamW.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_superscale.ops import reference
from lightning_superscale.ops.cpu.pool import Pool, Ticket, default_pool
from lightning_superscale.ops.native import loader
from lightning_superscale.ops.types import (
    GRAD_DTYPES,
    STATE_DTYPES,
    WEIGHT_DTYPES,
    AdamWHyper,
    AdamWSegment,
    GradStats,
)

# At most this many elements run in the calling thread: handing them over would cost more than the step.
INLINE_NUMEL = 65536


class _Mode(NamedTuple):
    name: str
    code: int
    reference: Callable[..., list[GradStats] | None]
    takes_next: bool
    needs_weight_out: bool
    writes_state: bool


_COMMIT = _Mode("adamw_commit", 0, reference.adamw_commit, False, False, True)
_PEEK = _Mode("adamw_peek", 1, reference.adamw_peek, False, True, False)
_COMMIT_PEEK = _Mode("adamw_commit_peek", 2, reference.adamw_commit_peek, True, True, True)


def adamw_commit(
    segments: Sequence[AdamWSegment], *, stats: bool = False, pool: Pool | None = None
) -> list[GradStats] | None:
    """Apply `grad` to param, exp_avg, exp_avg_sq in place; write `weight_out` if present.

    Args:
        segments: CPU tensors, see `AdamWSegment`; segments do not overlap each other.
        stats: also return sum of squares and non-finite count of each segment's scaled gradient.
        pool: the threads that run it; None takes `default_pool()`, or the calling thread for few elements.

    Raises:
        ValueError, TypeError: a tensor or number does not fit; names the segment.
    """
    return _run(_COMMIT, segments, stats, pool)


def adamw_peek(
    segments: Sequence[AdamWSegment], *, stats: bool = False, pool: Pool | None = None
) -> list[GradStats] | None:
    """Write to `weight_out` the values that `adamw_commit` would write, and change nothing else.

    Arguments and errors are those of `adamw_commit`; every segment needs a `weight_out`.
    """
    return _run(_PEEK, segments, stats, pool)


def adamw_commit_peek(
    segments: Sequence[AdamWSegment], *, stats: bool = False, pool: Pool | None = None
) -> list[GradStats] | None:
    """Commit `grad`, then peek `next_grad` from the state as stored; statistics are those of `next_grad`.

    Arguments and errors are those of `adamw_commit`; every segment needs `weight_out`, `next_grad` and `next_hyper`.
    """
    return _run(_COMMIT_PEEK, segments, stats, pool)


def submit_adamw_commit(
    segments: Sequence[AdamWSegment],
    *,
    stats: bool = False,
    pool: Pool | None = None,
    priority: int = 0,
    held: bool = False,
) -> Ticket[list[GradStats] | None]:
    """Submit `adamw_commit` to the pool and return at once; `ticket.wait()` returns the statistics.

    Args:
        priority: tickets of a larger priority run first, equal ones in order of submission.
        held: start only at `ticket.release()` or when a CUDA stream reaches `ops.cuda.runtime.launch_notify`.
    """
    return _submit(_COMMIT, segments, stats, pool, priority, held)


def submit_adamw_peek(
    segments: Sequence[AdamWSegment],
    *,
    stats: bool = False,
    pool: Pool | None = None,
    priority: int = 0,
    held: bool = False,
) -> Ticket[list[GradStats] | None]:
    """Submit `adamw_peek` to the pool; arguments are those of `submit_adamw_commit`."""
    return _submit(_PEEK, segments, stats, pool, priority, held)


def submit_adamw_commit_peek(
    segments: Sequence[AdamWSegment],
    *,
    stats: bool = False,
    pool: Pool | None = None,
    priority: int = 0,
    held: bool = False,
) -> Ticket[list[GradStats] | None]:
    """Submit `adamw_commit_peek` to the pool; arguments are those of `submit_adamw_commit`."""
    return _submit(_COMMIT_PEEK, segments, stats, pool, priority, held)


def _run(mode: _Mode, segments: Sequence[AdamWSegment], stats: bool, pool: Pool | None) -> list[GradStats] | None:
    _check_segments(mode, segments)
    lib = loader.native()
    if lib is None:
        return mode.reference(segments, stats=stats)
    structs = _structs(mode, segments)
    small = sum(seg.numel for seg in segments) <= INLINE_NUMEL
    handle = None if small and pool is None else (pool or default_pool()).handle
    loader.check(lib, lib.lss_adamw(handle, mode.code, structs, len(segments), int(stats), None, None))
    return _stats(structs) if stats else None


def _submit(
    mode: _Mode, segments: Sequence[AdamWSegment], stats: bool, pool: Pool | None, priority: int, held: bool
) -> Ticket[list[GradStats] | None]:
    segments = list(segments)
    _check_segments(mode, segments)
    lib = loader.native()
    if lib is None:
        return Ticket(run=lambda: mode.reference(segments, stats=stats), held=held)
    pool = pool or default_pool()
    structs = _structs(mode, segments)
    how = loader.SubmitStruct(priority, int(held))
    # The ticket keeps the tensors, not the segments, whose fields the caller may reassign.
    tensors = [tensor for seg in segments for tensor in _kept(mode, seg)]
    ticket = Ticket(lib=lib, keep=(pool, tensors, structs), run=lambda: _stats(structs) if stats else None)
    status = lib.lss_adamw(pool.handle, mode.code, structs, len(segments), int(stats), byref(how), ticket.slot())
    loader.check(lib, status)
    return ticket


def _tensors(mode: _Mode, seg: AdamWSegment) -> list[tuple[str, Tensor]]:
    """The tensors that the mode touches, by field name."""
    named = [
        ("param", seg.param),
        ("exp_avg", seg.exp_avg),
        ("exp_avg_sq", seg.exp_avg_sq),
        ("grad", seg.grad),
    ]
    if mode.takes_next and seg.next_grad is not None:
        named.append(("next_grad", seg.next_grad))
    if seg.weight_out is not None:
        named.append(("weight_out", seg.weight_out))
    if seg.compensation is not None:
        named.append(("compensation", seg.compensation))
    return named


def _kept(mode: _Mode, seg: AdamWSegment) -> list[Tensor]:
    """The tensors that work under way needs."""
    rows = [] if seg.selection is None else [seg.selection.rows]
    return [tensor for _, tensor in _tensors(mode, seg)] + rows


_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "param": STATE_DTYPES,
    "exp_avg": STATE_DTYPES,
    "exp_avg_sq": STATE_DTYPES,
    "grad": GRAD_DTYPES,
    "next_grad": GRAD_DTYPES,
    "weight_out": (*WEIGHT_DTYPES, torch.float32),
    "compensation": (torch.bfloat16,),
}


def _check_segments(mode: _Mode, segments: Sequence[AdamWSegment]) -> None:
    ranges: list[tuple[int, int, bool, int, str]] = []  # start, end, is_written, segment, field
    for index, seg in enumerate(segments):
        where = f"{mode.name}: segment {index}"
        if mode.needs_weight_out and seg.weight_out is None:
            raise ValueError(f"{where}: expected weight_out, found None: it is what this op writes")
        if mode.takes_next and (seg.next_grad is None or seg.next_hyper is None):
            raise ValueError(f"{where}: expected next_grad and next_hyper, found None: give both, or use adamw_commit")
        _check_rounding(where, seg)
        _check_hyper(where, seg.hyper)
        if mode.takes_next and seg.next_hyper is not None:
            _check_hyper(where, seg.next_hyper)
        _check_selection(where, seg)
        for field, tensor in _tensors(mode, seg):
            is_state = field in ("param", "exp_avg", "exp_avg_sq", "compensation")
            numel = seg.param.numel() if is_state else seg.numel
            _check_tensor(f"{where}: {field}", tensor, _DTYPES[field], numel)
            if numel:
                writes = field == "weight_out" or (mode.writes_state and not field.endswith("grad"))
                start = tensor.data_ptr()
                ranges.append((start, start + tensor.nbytes, writes, index, field))
    _check_overlap(mode, ranges)


def _check_hyper(where: str, hyper: AdamWHyper) -> None:
    if hyper.step < 1:
        raise ValueError(f"{where}: expected step >= 1, found {hyper.step}: the first update has step 1")
    if hyper.clip_value is not None and not hyper.clip_value >= 0:
        raise ValueError(f"{where}: expected clip_value None or >= 0, found {hyper.clip_value}")


def _check_rounding(where: str, seg: AdamWSegment) -> None:
    is_bf16, rounding = seg.param.dtype == torch.bfloat16, seg.rounding
    if is_bf16 and rounding is None:
        raise TypeError(
            f"{where}: param: expected torch.float32, or a rounding, found torch.bfloat16 without: give one"
        )
    if is_bf16 and seg.weight_out is not None and seg.weight_out.dtype != torch.bfloat16:
        raise TypeError(f"{where}: weight_out: expected torch.bfloat16 like param, found {seg.weight_out.dtype}")
    if seg.compensation is not None and not is_bf16:
        raise TypeError(f"{where}: compensation: expected with a bf16 param only, found {seg.param.dtype}")
    if rounding is not None and not (0 <= rounding.key < 2**63 and 0 <= rounding.first_element < 2**62):
        raise ValueError(
            f"{where}: expected a key in [0, 2**63) and a first_element in [0, 2**62), found {rounding.key} and "
            f"{rounding.first_element}"
        )


def _check_selection(where: str, seg: AdamWSegment) -> None:
    numel, chosen = seg.param.numel(), seg.selection
    if chosen is None:
        if seg.numel != numel:
            raise ValueError(f"{where}: grad: expected {numel} elements like param, found {seg.numel}")
        return
    if chosen.is_compact and numel != chosen.numel:
        raise ValueError(f"{where}: param: expected the {chosen.numel} elements of a compact selection, found {numel}")
    if numel < chosen.end or numel % chosen.row_numel:
        raise ValueError(
            f"{where}: param: expected whole rows of {chosen.row_numel} elements, at least {chosen.end} elements for "
            f"the last row of the selection, found {numel}"
        )
    if seg.numel != chosen.numel:
        raise ValueError(f"{where}: grad: expected {chosen.numel} elements of the selected rows, found {seg.numel}")


def _check_tensor(where: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], numel: int) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{where}: expected a CPU tensor, found one on {tensor.device}: copy it to host memory first")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{where}: expected {expected}, found {tensor.dtype}: convert it with .to()")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{where}: expected a contiguous 1D tensor, found shape {tuple(tensor.shape)} with stride "
            f"{tensor.stride()}: pass tensor.view(-1) of a contiguous tensor"
        )
    if tensor.numel() != numel:
        raise ValueError(f"{where}: expected {numel} elements like param, found {tensor.numel()}")


def _check_overlap(mode: _Mode, ranges: list[tuple[int, int, bool, int, str]]) -> None:
    """Refuse two ranges that share bytes when one of them is written, unless it is grad with its weight_out."""
    ranges.sort()
    reach: list[tuple[int, int, bool, int, str]] = []  # earlier ranges that reach beyond the current start
    for current in ranges:
        start, end, writes, index, field = current
        reach = [other for other in reach if other[1] > start]
        for other in reach:
            same_place = (other[0], other[1], other[3]) == (start, end, index)
            if same_place and {field, other[4]} == {"grad", "weight_out"}:
                continue
            if writes or other[2]:
                raise ValueError(
                    f"{mode.name}: segment {other[3]} {other[4]} and segment {index} {field} overlap in memory; only "
                    "grad and weight_out of one segment may share memory, element for element"
                )
        reach.append(current)


def _structs(mode: _Mode, segments: Sequence[AdamWSegment]) -> ctypes.Array[loader.AdamWSegmentStruct]:
    structs = (loader.AdamWSegmentStruct * len(segments))()
    for struct, seg in zip(structs, segments, strict=True):
        struct.param = seg.param.data_ptr()
        struct.exp_avg = seg.exp_avg.data_ptr()
        struct.exp_avg_sq = seg.exp_avg_sq.data_ptr()
        struct.grad = seg.grad.data_ptr()
        struct.numel = seg.numel
        struct.exp_avg_dtype = loader.DTYPE_CODES[seg.exp_avg.dtype]
        struct.exp_avg_sq_dtype = loader.DTYPE_CODES[seg.exp_avg_sq.dtype]
        struct.grad_dtype = loader.DTYPE_CODES[seg.grad.dtype]
        struct.param_dtype = loader.DTYPE_CODES[seg.param.dtype]
        struct.weight_out_dtype = loader.NO_DTYPE
        if seg.rounding is not None:
            struct.rounding = loader.STOCHASTIC if seg.rounding.is_stochastic else loader.NEAREST
            struct.key, struct.first_element = seg.rounding.key, seg.rounding.first_element
        if seg.selection is not None:
            struct.rows = seg.selection.rows.data_ptr()
            struct.row_numel, struct.row_stride = seg.selection.row_numel, seg.selection.row_stride
            struct.is_compact = seg.selection.is_compact
        if seg.compensation is not None:
            struct.compensation = seg.compensation.data_ptr()
        if seg.weight_out is not None:
            struct.weight_out = seg.weight_out.data_ptr()
            struct.weight_out_dtype = loader.DTYPE_CODES[seg.weight_out.dtype]
        _fill_hyper(struct.hyper, seg.hyper)
        if seg.device_scale is not None:
            struct.hyper.grad_scale = float(seg.device_scale)
        if mode.takes_next and seg.next_grad is not None and seg.next_hyper is not None:
            struct.next_grad = seg.next_grad.data_ptr()
            struct.next_grad_dtype = loader.DTYPE_CODES[seg.next_grad.dtype]
            _fill_hyper(struct.next_hyper, seg.next_hyper)
    return structs


def _fill_hyper(struct: loader.AdamWHyperStruct, hyper: AdamWHyper) -> None:
    s = hyper.scalars()
    struct.weight_decay_factor = s.weight_decay_factor
    struct.l2 = s.l2
    struct.lerp_weight = s.lerp_weight
    struct.beta2 = s.beta2
    struct.one_minus_beta2 = s.one_minus_beta2
    struct.bias_correction2_sqrt = s.bias_correction2_sqrt
    struct.eps = s.eps
    struct.neg_step_size = s.neg_step_size
    struct.grad_scale = hyper.grad_scale
    struct.has_l2 = int(not hyper.decoupled and hyper.weight_decay != 0)
    struct.has_clip = int(hyper.clip_value is not None)
    struct.clip_value = hyper.clip_value if hyper.clip_value is not None else 0.0
    struct.maximize = int(hyper.maximize)
    struct.installed_root = int(not hyper.ieee_sqrt)
    struct.step = hyper.step


def _stats(structs: ctypes.Array[loader.AdamWSegmentStruct]) -> list[GradStats]:
    return [GradStats(struct.sumsq, struct.nonfinite) for struct in structs]


def kernel_name() -> str:
    """The kernel that `adamw_commit` runs, in words."""
    isa = loader.isa_name()
    return "PyTorch operations, not fused (no native library)" if isa is None else f"native AdamW, {isa}"
