"""Gradient clipping as the optimizer engine applies it: requested first, computed once, fused in the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ClipByNorm:
    """Scale all gradients of one optimizer so that their global 2-norm is at most `max_norm`."""

    max_norm: float


@dataclass(frozen=True, slots=True)
class ClipByValue:
    """Limit every gradient element to [-clip_value, clip_value]."""

    clip_value: float


ClipRequest = ClipByNorm | ClipByValue


def grad_norms(grads: Sequence[Tensor]) -> Tensor:
    """2-norm of each gradient, fp32 [len(grads)], as `torch.nn.utils.clip_grad_norm_` takes them of fp32 gradients."""
    return torch.stack([torch.linalg.vector_norm(grad, 2, dtype=torch.float32) for grad in grads])


def total_norm(norms: Tensor) -> Tensor:
    """Global 2-norm of the norms in `norms`, fp32 scalar."""
    return torch.linalg.vector_norm(norms, 2)


def clip_coefficient(total: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by: `min(1, max_norm / (total + 1e-6))`; NaN where `total` is NaN.

    The order of operations is that of `torch.nn.utils.clip_grads_with_norm_`, so that clipped
    gradients have the bits that plain PyTorch gives.
    """
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)
