"""Checks and conversions that every Triton entry point shares."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Final

import torch
from torch import Tensor

from lightning_superscale.ops.cuda.capability import LEAST_FOR_TRITON, why_too_old

# fp32 arithmetic as written: a compiler that fuses a product into a sum changes bits.
ENABLE_FP_FUSION: Final = False

DTYPE_CODES: Final[dict[torch.dtype, int]] = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason() -> str | None:
    """Why the functions of `ops.triton` cannot run here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not torch.cuda.is_available() and not _is_interpreting():
        return "torch.cuda.is_available() is False: this needs an NVIDIA GPU, its driver and a CUDA build of PyTorch"
    return None if _is_interpreting() else why_too_old(LEAST_FOR_TRITON, "the Triton kernels")


def require(name: str, tensors: dict[str, Tensor]) -> None:
    """Raise unless Triton is installed and all tensors are on one device that it can reach."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(f"{name}: Triton is not installed; pip install triton, or use the CPU op of the same name")
    first_name, first = next(iter(tensors.items()))
    for tensor_name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected {tensor_name} on {first.device} like {first_name}, found {tensor.device}; "
                "all of a call is on one device"
            )
    if first.device.type != "cuda" and not _is_interpreting():
        raise ValueError(
            f"{name}: expected CUDA tensors, found {first_name} on {first.device}; "
            "use the CPU op of the same name there"
        )


def require_flat(name: str, tensors: dict[str, Tensor]) -> None:
    """Raise unless all tensors are contiguous, of one shape, and fp32, bf16 or fp16."""
    first_name, first = next(iter(tensors.items()))
    for tensor_name, tensor in tensors.items():
        require_float(name, tensor_name, tensor)
        if tensor.shape != first.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected {tensor_name} contiguous and of {first_name}'s shape {tuple(first.shape)}, found "
                f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )


def require_float(name: str, tensor_name: str, tensor: Tensor) -> None:
    """Raise unless the tensor is fp32, bf16 or fp16."""
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: expected {tensor_name} in float32, bfloat16 or float16, found {tensor.dtype}")


def as_kernel_input(tensor: Tensor) -> Tensor:
    """A tensor as the kernels take it: bf16 as int16 bits, any other dtype as it is."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def as_integers(tensor: Tensor) -> Tensor:
    """A view of a tensor's memory as integers of its element size."""
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which the tensor's device is current, since Triton launches on the current device's stream."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
