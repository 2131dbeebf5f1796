"""A tensor that knows where its tokens are, and hands every function of torch that it meets to that function's rule.

The memory of a `TokenTensor` is this rank's part; its shape, as user code sees it, is that of all tokens. Functions of
torch reach it through `__torch_function__`, in training and where activation checkpointing computes them again, so
nothing has to be traced, replaced or wrapped, and autograd sees plain operations on the rank's part.

[Note: Gradients of reduced values] Gradients of parameters are averaged over ranks in the end, so what comes of a
rank's own tokens must be its part of the gradient times the number of ranks ([Note: One loss contract] in loss.py).
What is computed of all tokens and is the same on every rank has the same, true gradient on every rank. `sum_over_ranks`
leads from the one to the other. In the other direction, where such a value is combined with tokens again, each rank
finds another gradient for it, from its own tokens: their mean over ranks is the true one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.sequence.tokens.layout import Layout, Reduced, Sharded, Sharing
from lightning_superscale.sequence.tokens.nested import LEAVES, leaves_of
from lightning_superscale.sequence.tokens.traced import TracedTokens, part_of_traced
from lightning_superscale.torch_private import all_reduce_in_graph, is_of_tracer, without_torch_function


class TokenTensor(Tensor):
    """A tensor with a layout; made by `with_layout`.

    Attributes:
        placement: where its tokens are.
        is_whole_value: whether it was made of a tensor that is no view: of what a function computed.
    """

    placement: Layout
    is_whole_value = False

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatching().dispatch(func, args, kwargs or {})


LEAVES.add(TokenTensor)


@functools.cache
def _dispatching() -> Any:
    # Rules import this module, for what they return.
    from lightning_superscale.sequence.tokens import dispatch

    return dispatch


def with_layout(x: Tensor, layout: Layout) -> TokenTensor:
    """The tensor, whose memory is this rank's part, as a TokenTensor; autograd follows."""
    if is_of_tracer(x):
        return cast("TokenTensor", TracedTokens(x, layout))
    with without_torch_function():
        tensor = x.as_subclass(TokenTensor)
        tensor.is_whole_value = x.grad_fn is not None and x._base is None
    tensor.placement = layout
    return tensor


def behind(x: Tensor) -> Tensor:
    """The plain tensor that was made a TokenTensor, where it is no view itself and autograd knows it; else this."""
    with without_torch_function():
        return cast("Tensor", x._base) if isinstance(x, TokenTensor) and x.is_whole_value else x


def is_of_its_own(x: Tensor) -> bool:
    """Whether autograd takes a tensor, or what it was made a TokenTensor of, for no view."""
    with without_torch_function():
        return behind(x)._base is None


def reduced(x: Tensor, sharing: Sharing) -> Tensor:
    """A value of all tokens that is the same on every rank; a plain tensor where no gradient leads back to tokens."""
    return with_layout(x, Reduced(sharing)) if x.requires_grad else plain(x)


def plain(x: Tensor) -> Tensor:
    """The memory of a tensor as a plain one: of a sharded one, this rank's part. Autograd follows.

    Anything that has no layout is returned itself, also what is no tensor.
    """
    if type(x) is not TokenTensor:
        return part_of_traced(x)
    with without_torch_function():
        return x.as_subclass(Tensor)


def part_shape(x: Tensor) -> torch.Size:
    """The sizes of a tensor's memory: of a sharded one, of this rank's part."""
    if type(x) is not TokenTensor:
        return part_of_traced(x).shape
    with without_torch_function():
        return x.shape


def ndim_of(x: Tensor) -> int:
    """The number of a tensor's dims."""
    return len(part_shape(x))


def layout_of(x: Any) -> Layout | None:
    """The layout of a tensor; None for a plain one and for anything else."""
    return x.placement if type(x) in (TokenTensor, TracedTokens) else None


def sharded_in(nested: Any) -> list[TokenTensor]:
    """The sharded tensors in lists, tuples and mappings, in order."""
    return [x for x in leaves_of(nested) if is_sharded(x)]


def mean_over_ranks(grad: Tensor, link: AxisLink) -> Tensor:
    """The mean over ranks of what each has found from its own tokens; autograd does not follow."""
    link.note("all_reduce", grad)
    return all_reduce_in_graph(grad.contiguous(), link.group_name) / link.size


class _EnterTokens(torch.autograd.Function):
    """The same value, whose gradient is the mean over ranks; see [Note: Gradients of reduced values]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, link: AxisLink) -> Tensor:
        ctx.link = link
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return mean_over_ranks(grads[0], ctx.link), None


def entering(x: Tensor) -> Tensor:
    """A tensor as it is combined with tokens: a reduced value as a plain one whose gradient is averaged over ranks."""
    layout = layout_of(x)
    if not isinstance(layout, Reduced):
        return part_of_traced(x)
    mean: Tensor = _EnterTokens.apply(plain(x), layout.sharing.link)  # type: ignore[no-untyped-call]
    return mean


def is_sharded(x: Any) -> bool:
    """Whether it is a tensor of which each rank has a part."""
    return isinstance(layout_of(x), Sharded)
