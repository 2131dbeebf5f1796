"""Code below torch's functions: autograd functions, operations and scripts of another package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKEN_WISE = ("tests.sequence.tokens.foreign.Sine", "tests.sequence.tokens.foreign.Summed", "lss_tests::doubled")


class Sine(torch.autograd.Function):
    """Treats every token by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0].cos()


class Summed(torch.autograd.Function):
    """Is named as one that treats every token by itself, and does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0][:, None]


class Unknown(torch.autograd.Function):
    """Nobody said what it does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


# Schemas are given: annotations are strings here.
@torch.library.custom_op("lss_tests::doubled", mutates_args=(), schema="(Tensor x) -> Tensor")
def doubled(x: Tensor) -> Tensor:
    return x * 2


doubled.register_autograd(lambda ctx, grad: grad * 2)


@torch.library.custom_op("lss_tests::unknown", mutates_args=(), schema="(Tensor x) -> Tensor")
def unknown(x: Tensor) -> Tensor:
    return x * 2


@torch.jit.script
def scripted(x):
    return x.sum(1)
