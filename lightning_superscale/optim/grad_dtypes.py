"""In which dtypes gradients are summed up and travel between ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_superscale.errors import SuperScaleError


@dataclass(frozen=True, slots=True)
class GradientDtypes:
    """Dtypes of gradients; None for that of the weights.

    Attributes:
        accumulation: of `param.grad`, in which autograd sums up micro-batches, uses and backward calls.
        reduction: in which ranks are averaged; None for that of `param.grad`.
    """

    accumulation: torch.dtype | None = None
    reduction: torch.dtype | None = None

    def reduced(self, param: Tensor) -> torch.dtype:
        """In which dtype a parameter's gradient travels."""
        return self.reduction or grad_dtype_of(param)


AS_WEIGHTS = GradientDtypes()


def grad_dtype_of(param: Tensor) -> torch.dtype:
    """The dtype that a parameter's gradient has in `param.grad`."""
    return getattr(param, "grad_dtype", None) or param.dtype


def widen_gradients(params: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Let autograd sum up the gradients of these parameters in `dtype`; one that is there already is converted.

    Raises:
        SuperScaleError: this version of torch can't.
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
    """`here = grad * scale`, computed in the wider of both dtypes' own arithmetic."""
    if here.dtype == grad.dtype:
        torch.mul(grad, scale, out=here)
    elif here.dtype == torch.float32:
        here.copy_(grad).mul_(scale)
    else:
        here.copy_(grad.float() * scale)
