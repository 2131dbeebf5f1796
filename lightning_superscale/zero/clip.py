"""Gradient clipping as the optimizer engine applies it: requested first, computed once, fused in the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.flat import sumsq


@dataclass(frozen=True, slots=True)
class ClipByNorm:
    """Scale all gradients of one optimizer so that their global 2-norm is at most `max_norm`."""

    max_norm: float


@dataclass(frozen=True, slots=True)
class ClipByValue:
    """Limit every gradient element to [-clip_value, clip_value]."""

    clip_value: float


ClipRequest = ClipByNorm | ClipByValue


def joined(requests: Sequence[ClipRequest], new: ClipRequest) -> list[ClipRequest]:
    """Requests of one step with one more: of two of a kind the stricter holds.

    Raises:
        SuperScaleError: a clip by norm after one by value: the norm would be that of clipped gradients.
    """
    if isinstance(new, ClipByNorm):
        if any(isinstance(r, ClipByValue) for r in requests):
            raise SuperScaleError(
                "gradients of one step can be clipped by norm, by value, or by norm and then by value; "
                "found a clip by norm after a clip by value."
            )
        return [ClipByNorm(min([new.max_norm, *(r.max_norm for r in requests if isinstance(r, ClipByNorm))]))]
    by_norm: list[ClipRequest] = [r for r in requests if isinstance(r, ClipByNorm)]
    return [
        *by_norm,
        ClipByValue(min([new.clip_value, *(r.clip_value for r in requests if isinstance(r, ClipByValue))])),
    ]


def grad_norm(grad: Tensor) -> Tensor:
    """2-norm of one gradient, fp32 scalar on its device, as `torch.nn.utils.clip_grad_norm_` takes it of fp32 ones."""
    norm: Tensor = torch.linalg.vector_norm(grad, 2, dtype=torch.float32)
    return norm


def grad_sumsq(grad: Tensor) -> Tensor:
    """Sum of squares of one gradient, fp64 scalar on its device: shards add up to the same norm however cut."""
    if grad.device.type == "cpu":
        return torch.tensor(sumsq(grad.contiguous()), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(grad, 2, dtype=torch.float64)
    return norm.square()


def total_norm(norms: Tensor) -> Tensor:
    """Global 2-norm of the norms in `norms`, fp32 scalar."""
    total: Tensor = torch.linalg.vector_norm(norms, 2)
    return total


def clip_coefficient(total: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by: `min(1, max_norm / (total + 1e-6))`; NaN where `total` is NaN.

    The order of operations is that of `torch.nn.utils.clip_grads_with_norm_`, so that clipped
    gradients have the bits that plain PyTorch gives.
    """
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)
