"""adamw_sr on CUDA tensors."""

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
from lightning_superscale.ops.types import AdamWHyper

_BLOCK = 512


def adamw_sr(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    hyper: AdamWHyper,
    *,
    seed: int,
    offset: int,
) -> None:
    """AdamW on bf16 weights and moments with stochastic rounding, in place; as in `ops/reference.py`.

    Args:
        param, exp_avg, exp_avg_sq: bf16, contiguous, of one shape, on one CUDA device.
        grad: fp32, bf16 or fp16, of the same shape.
        seed: of the whole run, in [0, 2**63).
        offset: the first element's number among all elements of the run, whoever holds them.
    """
    tensors = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grad}
    require("adamw_sr", tensors)
    require_flat("adamw_sr", tensors)
    for name, tensor in tensors.items():
        if name != "grad" and tensor.dtype != torch.bfloat16:
            raise TypeError(f"adamw_sr: expected {name} in bfloat16, found {tensor.dtype}; use adamw_commit for fp32")
    if not (0 <= seed < 2**63 and 0 <= offset < 2**63 and 0 < hyper.step < 2**31):
        raise ValueError(
            f"adamw_sr: expected seed and offset in [0, 2**63) and step in [1, 2**31), found {seed}, {offset}, "
            f"{hyper.step}"
        )
    from lightning_superscale.ops.triton.kernels.adamw_sr import adamw_sr_kernel

    if param.numel() == 0:
        return
    with on_device_of(param):
        adamw_sr_kernel[(-(-param.numel() // _BLOCK),)](
            *map(as_kernel_input, tensors.values()),
            param.numel(),
            seed,
            offset,
            hyper.step,
            *hyper.scalars(),
            hyper.grad_scale,
            hyper.clip_value or 0.0,
            GRAD=DTYPE_CODES[grad.dtype],
            HAS_DECAY=hyper.decoupled and hyper.weight_decay != 0,
            HAS_L2=not hyper.decoupled and hyper.weight_decay != 0,
            HAS_CLIP=hyper.clip_value is not None,
            MAXIMIZE=hyper.maximize,
            BLOCK=_BLOCK,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
