"""Layers and products of matrices: every token with the same weights."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import Replicated, Sharded
from lightning_superscale.sequence.tokens.nested import map_leaves
from lightning_superscale.sequence.tokens.rules.elementwise import beside
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import (
    entering,
    is_sharded,
    layout_of,
    ndim_of,
    part_shape,
    plain,
    with_layout,
)
from lightning_superscale.sequence.tokens.traced import is_tensor

_BY_HAND = (
    "Use torch.nn.functional.scaled_dot_product_attention, which ranks share; in transformers, "
    "attn_implementation='sdpa'."
)


def entered(x: Tensor) -> Any:
    """A tensor at the first layer: this rank's part of one of which every rank has all tokens."""
    layout = layout_of(x)
    if not isinstance(layout, Replicated):
        return x
    layout.sharing.seen.num_entries += 1
    frame = layout.sharing.frame(layout.tokens.length)
    sharded = Sharded(layout.tokens, layout.sharing, frame)
    return with_layout(sharded.take(plain(x)), sharded)


def _entered(call: Call) -> Call:
    args, kwargs = map_leaves(lambda x: entered(x) if is_tensor(x) else x, (call.args, call.kwargs))
    return Call(call.func, call.name, args, kwargs)


def tokens_looked_up(call: Call) -> Call:
    """The call of an embedding with this rank's part of ids; refused where that would not give its part of rows."""
    call = _entered(call)
    ids, weight, _, max_norm, _, by_frequency = call.bind(
        "input weight padding_idx max_norm norm_type scale_grad_by_freq"
    )
    if is_sharded(weight) or not is_sharded(ids):
        call.refuse("looks up tokens", "Look up whole tensors by ids.")
    if max_norm is not None or by_frequency:
        option = "max_norm" if max_norm is not None else "scale_grad_by_freq"
        call.refuse(
            f"with {option} changes weights by all ids of a batch, of which this rank has a part", "Leave it out."
        )
    return call


@rule("embedding")
def embedding(call: Call) -> Any:
    call = tokens_looked_up(call)
    return with_layout(call.run(), call.args[0].placement)


def tokens_multiplied(call: Call) -> Call:
    """The call of a linear layer with this rank's part of tokens; refused where it would mix them."""
    call = _entered(call)
    x, weight = call.bind("input weight")
    if is_sharded(weight) or not is_sharded(x) or x.placement.tokens.dim == ndim_of(x) - 1:
        call.refuse("mixes tokens with one another", "Apply layers to the dim of features.")
    return call


@rule("linear")
def linear(call: Call) -> Any:
    call = tokens_multiplied(call)
    return with_layout(call.run(), call.args[0].placement)


@rule("layer_norm", "rms_norm")
def norm(call: Call) -> Any:
    call = _entered(call)
    x, shape = call.bind("input normalized_shape")
    if not is_sharded(x) or x.placement.tokens.dim >= ndim_of(x) - len(shape):
        call.refuse("takes mean and deviation over tokens", "Normalize features only.")
    return with_layout(call.run(), x.placement)


@rule("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "outer")
def matmul(call: Call) -> Any:
    left, right = (x for x in (*call.args, *call.kwargs.values()) if is_tensor(x))
    if call.name == "__rmatmul__":
        left, right = right, left
    if ndim_of(left) < 2 or ndim_of(right) < 2 or call.name in ("dot", "inner", "outer", "mv"):
        call.refuse("multiplies vectors with tokens", "Give both a dim of features: x @ w[:, None].")
    return _product(call, left, right)


def _product(call: Call, left: Any, right: Any) -> Any:
    """The product of matrices, or of batches of them: tokens are rows of the left, columns of the right, or apart."""
    places = [x.placement.tokens.dim - ndim_of(x) if is_sharded(x) else None for x in (left, right)]
    if places == [-2, -1]:
        call.refuse("compares every token with every other: scores of attention by hand", _BY_HAND)
    if places[0] == -1 or places[1] == -2:
        call.refuse(
            "sums over tokens: attention by hand, or linear attention, whose state is that of all tokens", _BY_HAND
        )
    layout = (left if is_sharded(left) else right).placement
    if None not in places and (places[0] != places[1] or not layout.has_same_tokens(right.placement)):
        call.refuse("multiplies a token with another one", _BY_HAND)
    from_right = next(place for place in places if place is not None)
    if from_right < -2:  # a dim of the batch
        left, right = (beside(call, x, from_right, layout) for x in (left, right))
    result = torch.matmul(plain(entering(left)), plain(entering(right)))
    return with_layout(result, layout.at(result.dim() + from_right))


@rule("addmm", "baddbmm", "addbmm")
def addmm(call: Call) -> Any:
    call = _entered(call)
    factors = "mat1 mat2" if call.name == "addmm" else "batch1 batch2"
    bias, left, right = call.bind(f"input {factors}")
    alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
    if call.name == "addbmm" or is_sharded(right) or not is_sharded(left):
        call.refuse("sums over tokens, or multiplies tokens with one another", _BY_HAND)
    from_right, layout = left.placement.tokens.dim - ndim_of(left), left.placement
    if from_right == -1:
        call.refuse("sums over tokens", _BY_HAND)
    own = beside(call, bias, from_right, layout)
    own, left, right = (plain(entering(x)) for x in (own, left, right))
    function = torch.addmm if call.name == "addmm" else torch.baddbmm
    return with_layout(function(own, left, right, beta=beta, alpha=alpha), layout)


@rule("einsum")
def einsum(call: Call) -> Any:
    """Tokens have one letter, which is in the result."""
    equation, *operands = call.args
    if not isinstance(equation, str):
        call.refuse("without letters", "Give an equation such as 'btd,vd->btv'.")
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow or "." in equation or len(names) != len(operands):
        call.refuse(f"with {equation!r}", "Write out all letters, and those of the result.")
    if any(len(set(name)) < len(name) for name in names):
        call.refuse(f"with {equation!r} takes a diagonal", "Take it before the model's first layer.")
    letters = {name[x.placement.tokens.dim] for name, x in zip(names, operands, strict=True) if is_sharded(x)}
    if len(letters) > 1 or not letters <= set(output):
        call.refuse(f"with {equation!r} compares tokens with one another, or sums over them", _BY_HAND)
    (letter,) = letters
    first = next(x for x in operands if is_sharded(x))
    if not all(first.placement.has_same_tokens(x.placement) for x in operands if is_sharded(x)):
        call.refuse("multiplies a token with another one", _BY_HAND)
    own = [_own(x, name, letter, first.placement) for x, name in zip(operands, names, strict=True)]
    return with_layout(torch.einsum(equation, *own), first.placement.at(output.index(letter)))


def _own(x: Tensor, name: str, letter: str, layout: Sharded) -> Tensor:
    """An operand of an einsum: of a whole one with the tokens' letter, this rank's part."""
    if is_sharded(x) or letter not in name or part_shape(x)[name.index(letter)] != layout.tokens.size:
        return plain(entering(x))
    return layout.take(plain(entering(x)), name.index(letter))


@rule("conv1d", "conv2d", "conv3d")
def conv(call: Call) -> Any:
    x, weight = call.bind("input weight")
    steps = call.bind("input weight bias stride padding dilation groups", stride=1, padding=0, dilation=1)[3:5]
    plain_steps = [one if isinstance(one, (int, str)) else max(one) for one in steps]
    is_tokenwise = is_sharded(x) and prod(part_shape(weight)[2:]) == 1 and plain_steps in ([1, 0], [1, "valid"])
    if not is_tokenwise or x.placement.tokens.dim < 2:
        call.refuse(
            "reads the neighbours of each token, which other ranks have",
            "Only kernels of size 1 can be shared so far.",
        )
    return with_layout(call.run(), x.placement)
