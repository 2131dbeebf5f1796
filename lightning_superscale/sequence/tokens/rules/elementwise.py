"""Functions that treat every element by itself, and those that keep or make a tensor of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.sequence.tokens.call import Call, global_shape
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import TokenTensor, entering, is_sharded, plain, with_layout
from lightning_superscale.torch_private import tree_map


def common(call: Call, tensors: list[TokenTensor]) -> tuple[int, Sharded]:
    """The place from the right of the dim of tokens, and the layout, of tensors that are broadcast together."""
    first = tensors[0]
    from_right = first.placement.tokens.dim - plain(first).dim()  # type: ignore[union-attr]
    for other in tensors[1:]:
        if other.placement.tokens.dim - plain(other).dim() != from_right:  # type: ignore[union-attr]
            call.refuse(
                "combines tensors whose tokens are on different dims: every token with every other",
                "Use torch.nn.functional.scaled_dot_product_attention for attention.",
            )
        if not first.placement.has_same_tokens(other.placement):  # type: ignore[union-attr,arg-type]
            call.refuse(
                "combines a token with another one, at a distance or of another sequence",
                "Compute it from whole tensors of the batch, before the model's first layer.",
            )
    return from_right, first.placement  # type: ignore[return-value]


def beside(x: Any, from_right: int, layout: Sharded, *, fill: float | bool = 0) -> Any:
    """An operand that is broadcast with sharded ones, of which this rank takes its part if it is whole."""
    if not isinstance(x, Tensor) or is_sharded(x):
        return x
    if plain(x).dim() < -from_right or plain(x).shape[from_right] == 1 != layout.tokens.size:
        return entering(x)
    whole = plain(entering(x))
    if whole.shape[from_right] != layout.tokens.size:
        return whole  # torch will say that shapes don't fit
    return layout.take(whole, whole.dim() + from_right, fill=fill)


@rule("elementwise", "where", "masked_fill", "masked_fill_", "lerp", "addcmul", "addcdiv", "type_as", "isclose")
def elementwise(call: Call) -> Any:
    """Each rank computes its part; operands are broadcast as torch does."""
    if call.kwargs.get("out") is not None:
        call.refuse("writes to out=", "Use the result.")
    if call.name.endswith("_") and not call.name.endswith("__") and not is_sharded(call.args[0]):
        call.refuse(
            "writes tokens into a tensor that every rank has whole", "Use the result of the function without _."
        )
    from_right, layout = common(call, call.sharded)
    args, kwargs = tree_map(lambda x: beside(x, from_right, layout), (call.args, call.kwargs))
    result = call.run(*args, **kwargs)
    if result is call.args[0] or not isinstance(result, Tensor):
        return result
    return with_layout(result, layout.at(result.dim() + from_right))


@rule("__rsub__", "__rdiv__", "__rtruediv__", "__rpow__", "__rfloordiv__", "__rmod__", "__rmul__", "__radd__")
def reflected(call: Call) -> Any:
    return elementwise(call)


@rule(
    "__and__", "__or__", "__xor__", "__invert__", "__eq__", "__ne__", "__floordiv__", "__rand__", "__ror__", "__rxor__"
)
def operator(call: Call) -> Any:
    return elementwise(call)


@rule("relu6", "hardswish", "softsign", "logsigmoid", "tanhshrink", "hardtanh", "softplus", "threshold", "selu", "celu")
def activation(call: Call) -> Any:
    return elementwise(call)


@rule(
    "to",
    "float",
    "double",
    "half",
    "bfloat16",
    "int",
    "long",
    "bool",
    "type",
    "cpu",
    "cuda",
    "clone",
    "contiguous",
    "detach",
    "detach_",
    "alias",
    "requires_grad_",
    "zero_",
    "fill_",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "get data",
    "view_as_same",
)
def kept(call: Call) -> Any:
    """The same tokens in a tensor of the same shape."""
    result = call.run()
    if result is call.args[0] or not isinstance(result, Tensor):
        return result
    return with_layout(result, call.sharded[0].placement)


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
def new(call: Call) -> Any:
    """A whole tensor of the sizes that the caller gives."""
    return call.run()


@rule("dropout")
def dropout(call: Call) -> Any:
    """The elements that one process would drop: every rank draws all numbers and takes those of its tokens."""
    x, p, training, inplace = call.bind("input p training inplace", p=0.5, training=True)
    if not training or p == 0:
        return x
    dtype = plain(x).dtype
    kept = functional.dropout(torch.ones(global_shape(x), dtype=dtype, device=plain(x).device), p)
    scale = with_layout(x.placement.take(kept), x.placement)
    return x.mul_(scale) if inplace else x * scale


@rule("rand_like", "randn_like")
def random_like(call: Call) -> Any:
    """The numbers that one process would draw."""
    x = call.args[0]
    whole = call.func(torch.empty(global_shape(x), dtype=plain(x).dtype, device=plain(x).device), **call.kwargs)
    return with_layout(x.placement.take(whole), x.placement)
