"""cast_scale and accumulate on CUDA tensors."""

from __future__ import annotations

from torch import Tensor

from lightning_superscale.ops.triton.launch import (
    DTYPE_CODES,
    ENABLE_FP_FUSION,
    as_kernel_input,
    on_device_of,
    require,
    require_flat,
)

_BLOCK = 1024


def cast_scale(dst: Tensor, src: Tensor, scale: float = 1.0) -> None:
    """`dst = src.float() * scale`, rounded to nearest even in dst's dtype; any of fp32, bf16, fp16.

    Args:
        dst, src: contiguous, of one shape, on one CUDA device; src may be dst.
    """
    require("cast_scale", {"dst": dst, "src": src})
    require_flat("cast_scale", {"dst": dst, "src": src})
    from lightning_superscale.ops.triton.kernels.elementwise import cast_scale_kernel

    if dst.numel() == 0:
        return
    with on_device_of(dst):
        cast_scale_kernel[(-(-dst.numel() // _BLOCK),)](
            as_kernel_input(dst),
            as_kernel_input(src),
            float(scale),
            dst.numel(),
            DST=DTYPE_CODES[dst.dtype],
            SRC=DTYPE_CODES[src.dtype],
            BLOCK=_BLOCK,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )


def accumulate(acc: Tensor, delta: Tensor, scale: float = 1.0) -> None:
    """`acc += delta.float() * scale` in fp32, the product rounded first, the sum once into acc's dtype.

    Args:
        acc, delta: contiguous, of one shape, on one CUDA device; fp32, bf16 or fp16 each.
    """
    require("accumulate", {"acc": acc, "delta": delta})
    require_flat("accumulate", {"acc": acc, "delta": delta})
    from lightning_superscale.ops.triton.kernels.elementwise import accumulate_kernel

    if acc.numel() == 0:
        return
    with on_device_of(acc):
        accumulate_kernel[(-(-acc.numel() // _BLOCK),)](
            as_kernel_input(acc),
            as_kernel_input(delta),
            float(scale),
            acc.numel(),
            ACC=DTYPE_CODES[acc.dtype],
            DELTA=DTYPE_CODES[delta.dtype],
            BLOCK=_BLOCK,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
