"""Functions that treat every element by itself, and those that keep or make a tensor of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.sequence.tokens.call import Call, global_shape
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.nested import map_leaves
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import (
    TokenTensor,
    entering,
    is_sharded,
    ndim_of,
    part_shape,
    plain,
    with_layout,
)
from lightning_superscale.sequence.tokens.traced import is_tensor
from lightning_superscale.torch_private import without_torch_function


def common(call: Call, tensors: list[TokenTensor]) -> tuple[int, Sharded]:
    """The place from the right of the dim of tokens, and the layout, of tensors that are broadcast together."""
    first = tensors[0]
    from_right = first.placement.tokens.dim - ndim_of(first)  # type: ignore[union-attr]
    for other in tensors[1:]:
        if other.placement.tokens.dim - ndim_of(other) != from_right:  # type: ignore[union-attr]
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


def beside(call: Call, x: Any, from_right: int, layout: Sharded, *, fill: float | bool | None = None) -> Any:
    """An operand that is broadcast with sharded ones, of which this rank takes its part if it is whole."""
    if not is_tensor(x) or is_sharded(x):
        return x
    has_dim = ndim_of(x) >= -from_right
    size = part_shape(x)[from_right] if has_dim else 1
    if not has_dim or size == 1 != layout.tokens.size:
        return entering(x)
    if size != layout.tokens.size:
        call.refuse(
            f"meets a tensor of {layout.tokens.size} tokens with one of {size} there",
            "A tensor that every rank has is expected with all tokens.",
        )
    whole = plain(entering(x))
    return layout.take(whole, whole.dim() + from_right, fill=fill)


def in_place(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenTensor:
    """The first argument, changed at the tokens of its window: what lies outside may be tokens of another view."""
    x: TokenTensor = call.args[0]
    layout = x.placement
    if not isinstance(layout, Sharded):
        raise AssertionError("dispatch refuses to write tokens into whole tensors")
    if layout.is_full:
        call.run(*args, **kwargs)
        return x
    part = plain(x)
    changed = call.run(part.clone(), *args[1:], **kwargs)
    new = torch.where(layout.is_token(part), changed, part)
    with without_torch_function():
        x.copy_(new)
    return x


# What torch's registers of pointwise operations don't name.
_MORE = [
    *("where", "masked_fill", "masked_fill_", "lerp", "addcmul", "addcdiv", "type_as", "isclose", "copy_", "fill_"),
    *("zero_", "relu6", "hardswish", "softsign", "logsigmoid", "tanhshrink", "hardtanh", "softplus", "threshold"),
    *(
        "selu",
        "celu",
        "leaky_relu",
        "leaky_relu_",
        "special_expit",
        "bucketize",
        "isin",
        "complex",
        "polar",
        "get real",
        "get imag",
    ),
    *(f"__r{name}__" for name in ("sub", "div", "truediv", "pow", "floordiv", "mod", "mul", "add", "and", "or", "xor")),
    *(f"__i{name}__" for name in ("sub", "div", "truediv", "pow", "floordiv", "mod", "mul", "add", "and", "or", "xor")),
    *(f"__{name}__" for name in ("and", "or", "xor", "invert", "eq", "ne", "floordiv", "lshift", "rshift")),
]
# Those that change their argument where their option says so.
_HAVE_INPLACE = frozenset(
    ["relu", "relu6", "elu", "selu", "celu", "leaky_relu", "silu", "mish", "hardtanh", "hardswish", "hardsigmoid"]
    + ["threshold"]
)


@rule("elementwise", *_MORE)
def elementwise(call: Call) -> Any:
    """Each rank computes its part; operands are broadcast as torch does."""
    if call.name == "where" and len(call.args) + len(call.kwargs) == 1:
        call.refuse("finds other numbers of tokens on each rank", "Give where() two values.")
    from_right, layout = common(call, call.sharded)

    def operand(x: Any) -> Any:
        return beside(call, x, from_right, layout)

    args, kwargs = map_leaves(operand, call.args), map_leaves(operand, call.kwargs)
    asks = call.name in _HAVE_INPLACE and (kwargs.get("inplace") or any(x is True for x in args[1:]))
    if call.is_in_place or asks:
        return in_place(call, args, kwargs)
    return map_leaves(
        lambda y: with_layout(y, layout.at(y.dim() + from_right)) if is_tensor(y) else y,
        call.run(*args, **kwargs),
    )


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
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "get data",
)
def kept(call: Call) -> Any:
    """The same tokens in a tensor of the same shape."""
    result = call.run()
    if not is_sharded(call.args[0]):
        return result  # of the dtype and device of one with tokens
    if result is call.args[0] or not is_tensor(result):
        return result
    return with_layout(result, call.sharded[0].placement)


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
def new(call: Call) -> Any:
    """A whole tensor of the sizes that the caller gives."""
    if call.name == "new_tensor" and len(call.sharded) > 1:
        call.refuse("copies the memory of tokens, of which this rank has a part", "Use .detach().clone().")
    return call.run()


@rule("dropout")
def dropout(call: Call) -> Any:
    """The elements that one process would drop: every rank draws all numbers and takes those of its tokens."""
    x, p, training, inplace = call.bind("input p training inplace", p=0.5, training=True)
    if not training or p == 0:
        return x
    drawn = functional.dropout(_like_whole(x).fill_(1), p)
    scale = with_layout(x.placement.take(drawn), x.placement)
    return x.mul_(scale) if inplace else x * scale


def _like_whole(x: TokenTensor) -> Tensor:
    """An empty tensor of all tokens, whose dims lie in memory as those of a part: random numbers follow that order."""
    part, sizes = plain(x), global_shape(x)
    order = sorted(range(part.dim()), key=part.stride, reverse=True)
    empty = torch.empty([sizes[dim] for dim in order], dtype=part.dtype, device=part.device)
    return empty.permute([order.index(dim) for dim in range(part.dim())])


@rule("rand_like", "randn_like", "randint_like")
def random_like(call: Call) -> Any:
    """The numbers that one process would draw."""
    x = call.args[0]
    whole = call.func(_like_whole(x), *call.args[1:], **call.kwargs)
    return with_layout(x.placement.take(whole), x.placement)
