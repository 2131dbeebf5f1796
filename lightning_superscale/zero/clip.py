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


def grad_norms(grads: Sequence[Tensor]) -> Tensor:
    """2-norm of each gradient, fp32 [len(grads)], as `torch.nn.utils.clip_grad_norm_` takes them of fp32 gradients.

    On the gradients' device; on the host when they are on several.
    """
    norms = [torch.linalg.vector_norm(grad, 2, dtype=torch.float32) for grad in grads]
    devices = {norm.device for norm in norms}
    if len(devices) == 1:
        return torch.stack(norms)
    joined = torch.empty(len(norms))
    for device in devices:
        here = [i for i, norm in enumerate(norms) if norm.device == device]
        joined[here] = torch.stack([norms[i] for i in here]).cpu()
    return joined


def grad_sumsq(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares of each gradient, fp64 [len(grads)], on the host: shards add up to the same norm however cut."""
    host = [torch.tensor(sumsq(g.contiguous()), dtype=torch.float64) if g.device.type == "cpu" else None for g in grads]
    rest = [torch.linalg.vector_norm(g, 2, dtype=torch.float64) ** 2 for g in grads if g.device.type != "cpu"]
    on_host = iter(torch.stack(rest).cpu() if rest else ())
    return torch.stack([value if value is not None else next(on_host) for value in host])


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
