"""adamw_low on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_superscale.ops.triton.launch import (
    DTYPE_CODES,
    ENABLE_FP_FUSION,
    as_kernel_input,
    on_device_of,
    require,
    require_flat,
)
from lightning_superscale.ops.types import STATE_DTYPES, AdamWSegment

_BLOCK = 512


def _check_tensors(seg: AdamWSegment, given: dict[str, Tensor]) -> None:
    require("adamw_low", given)
    require_flat("adamw_low", given)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        if given[name].dtype not in STATE_DTYPES:
            raise TypeError(f"adamw_low: expected {name} in float32 or bfloat16, found {given[name].dtype}")
    if seg.compensation is not None and {seg.param.dtype, seg.compensation.dtype} != {torch.bfloat16}:
        raise TypeError(
            f"adamw_low: expected compensation and its param in bfloat16, found {seg.compensation.dtype} and "
            f"{seg.param.dtype}"
        )


def _check_scale(seg: AdamWSegment) -> None:
    scale, device = seg.device_scale, seg.param.device
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != device):
        raise ValueError(
            f"adamw_low: expected device_scale to be one float32 element on {device}, found {scale.dtype} of shape "
            f"{tuple(scale.shape)} on {scale.device}"
        )


def _check_selection(seg: AdamWSegment) -> None:
    chosen = seg.selection
    if chosen is None:
        return
    if not chosen.is_compact or chosen.rows.device != seg.param.device or chosen.numel != seg.param.numel():
        raise ValueError(
            f"adamw_low: expected a compact selection of {seg.param.numel()} elements whose rows are on "
            f"{seg.param.device}, found one of {chosen.numel} elements on {chosen.rows.device}"
            f"{'' if chosen.is_compact else ' that is not compact'}"
        )


def adamw_low(seg: AdamWSegment) -> None:
    """Commit one segment's update of low-precision states, as in `ops/reference.py`, on the current stream.

    Args:
        seg: a segment with a rounding, whose tensors are contiguous, of one shape and on one CUDA device. Its
            `weight_out` may not be `grad`.

    Raises:
        TypeError, ValueError: a segment without a rounding, or a tensor that does not fit.
    """
    rounding = seg.rounding
    if rounding is None:
        raise TypeError("adamw_low: expected a segment with a rounding, found None; use adamw_commit for torch's order")
    tensors = {"param": seg.param, "exp_avg": seg.exp_avg, "exp_avg_sq": seg.exp_avg_sq, "grad": seg.grad}
    optional = {"weight_out": seg.weight_out, "compensation": seg.compensation}
    _check_tensors(seg, tensors | {name: tensor for name, tensor in optional.items() if tensor is not None})
    _check_scale(seg)
    _check_selection(seg)
    from lightning_superscale.ops.triton.kernels.adamw_low import adamw_low_kernel

    hyper, chosen = seg.hyper, seg.selection
    if seg.param.numel() == 0:
        return
    with on_device_of(seg.param):
        adamw_low_kernel[(-(-seg.param.numel() // _BLOCK),)](
            *(as_kernel_input(tensor) for tensor in tensors.values()),
            # A pointer that the kernel never follows stands for a tensor that is not there.
            *(as_kernel_input(seg.param if tensor is None else tensor) for tensor in optional.values()),
            seg.param.numel(),
            rounding.key,
            rounding.first_element,
            as_kernel_input(seg.grad) if chosen is None else chosen.rows,
            1 if chosen is None else chosen.row_numel,
            1 if chosen is None else chosen.row_stride,
            hyper.step,
            *hyper.scalars(),
            seg.grad_scale,
            hyper.clip_value or 0.0,
            PARAM=DTYPE_CODES[seg.param.dtype],
            EXP_AVG=DTYPE_CODES[seg.exp_avg.dtype],
            EXP_AVG_SQ=DTYPE_CODES[seg.exp_avg_sq.dtype],
            GRAD=DTYPE_CODES[seg.grad.dtype],
            WEIGHT_OUT=0 if seg.weight_out is None else DTYPE_CODES[seg.weight_out.dtype],
            STOCHASTIC=rounding.is_stochastic,
            COMPENSATED=seg.compensation is not None,
            BY_ROWS=chosen is not None,
            HAS_DECAY=hyper.decoupled and hyper.weight_decay != 0,
            HAS_L2=not hyper.decoupled and hyper.weight_decay != 0,
            SCALE_ON_DEVICE=seg.device_scale is not None,
            HAS_CLIP=hyper.clip_value is not None,
            MAXIMIZE=hyper.maximize,
            BLOCK=_BLOCK,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
