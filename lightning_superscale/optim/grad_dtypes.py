"""Dtypes in which gradients are summed up and travel between ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.state_dtypes import WIDE_DTYPES


@dataclass(frozen=True, slots=True)
class GradientDtypes:
    """Dtypes of gradients; None for that of the weights.

    Attributes:
        accumulation: dtype of `param.grad`, in which autograd sums up micro-batches, uses and backward calls.
        reduction: dtype in which gradients are averaged over ranks; None for that of `param.grad`.
    """

    accumulation: torch.dtype | None = None
    reduction: torch.dtype | None = None

    def reduced(self, param: Tensor) -> torch.dtype:
        """The dtype in which a parameter's gradient travels between ranks."""
        own = grad_dtype_of(param)
        return own if self.reduction is None or own in WIDE_DTYPES else self.reduction


AS_WEIGHTS = GradientDtypes()


def grad_dtype_of(param: Tensor) -> torch.dtype:
    """The dtype that a parameter's gradient has in `param.grad`."""
    return getattr(param, "grad_dtype", None) or param.dtype


def widen_gradients(params: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Let autograd sum up the gradients of these parameters in `dtype`; gradients that are there are converted.

    Raises:
        SuperScaleError: this version of torch has no `Tensor.grad_dtype`.
    """
    for param in params:
        if not hasattr(param, "grad_dtype"):
            raise SuperScaleError(
                f"gradient_accumulation needs a torch that knows Tensor.grad_dtype, found {torch.__version__}. Update "
                "torch, or remove gradient_accumulation."
            )
        _convert(param, dtype)


def narrow_gradients(params: Iterable[nn.Parameter]) -> None:
    """Give parameters gradients of their own dtype again, after `widen_gradients`."""
    for param in params:
        if grad_dtype_of(param) != param.dtype:
            _convert(param, param.dtype)


def _convert(param: nn.Parameter, dtype: torch.dtype) -> None:
    grad, param.grad = param.grad, None
    param.grad_dtype = dtype
    if grad is not None:
        param.grad = grad.to(dtype)


def packed_into(here: Tensor, grad: Tensor, scale: float) -> None:
    """Write `grad * scale` to `here`, of equal shape: in their dtype where both have one, else computed in fp32."""
    if here.dtype == grad.dtype:
        torch.mul(grad, scale, out=here)
    elif here.dtype == torch.float32:
        here.copy_(grad).mul_(scale)
    else:
        here.copy_(grad.float() * scale)
