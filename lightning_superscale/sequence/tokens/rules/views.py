"""Functions that change the shape of a tensor: where its tokens are afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from lightning_superscale.sequence.tokens.call import Call, global_shape
from lightning_superscale.sequence.tokens.layout import Replicated, Sharded, TokenDim
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import layout_of, ndim_of, plain, with_layout
from lightning_superscale.sequence.tokens.traced import is_tensor


def regrouped(shape: Sequence[int], sizes: Sequence[int], tokens: TokenDim) -> TokenDim | None:
    """The dim of tokens after a tensor of `shape` is given other `sizes`; None where tokens share it with features."""
    before, after = prod(shape[: tokens.dim]) * tokens.outer, prod(shape[tokens.dim + 1 :])
    found = []
    for dim, size in enumerate(sizes):
        outer, rest = divmod(size, tokens.length)
        if rest == 0 and prod(sizes[dim + 1 :]) == after and prod(sizes[:dim]) * outer == before:
            found.append(TokenDim(dim, tokens.length, outer))
    # One token fits several dims of size 1: the one where it was comes first.
    return min(found, key=lambda one: (one.outer != tokens.outer, one.dim != tokens.dim), default=None)


def resolved(sizes: Sequence[int], numel: int) -> list[int]:
    """The sizes of so many elements, of which -1 stands for what is left."""
    known = prod(size for size in sizes if size != -1)
    return [numel // known if size == -1 and known else size for size in sizes]


def flattened(call: Call, shape: Sequence[int]) -> list[int]:
    """The sizes that a call of flatten gives a tensor of this shape."""
    first, last = (dim % len(shape) for dim in call.bind("input start_dim end_dim", start_dim=0, end_dim=-1)[1:])
    return [*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :]]


def _target(call: Call) -> list[int] | None:
    """The sizes that a call asks for; None where it reads memory as another dtype."""
    x, shape = call.args[0], global_shape(call.args[0])
    if call.name in ("view_as", "reshape_as"):
        return global_shape(call.args[1])
    if call.name == "flatten":
        return flattened(call, shape)
    if call.name == "unflatten":
        dim, sizes = call.bind("input dim sizes")[1:]
        dim %= len(shape)
        return [*shape[:dim], *resolved(sizes, shape[dim]), *shape[dim + 1 :]]
    sizes = call.sizes("shape size")
    if any(isinstance(size, torch.dtype) for size in sizes):
        return None
    return resolved(sizes, prod(global_shape(x)))


_RESHAPES = ("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten")


@rule(*_RESHAPES)
def reshape(call: Call) -> Any:
    x, sizes = call.args[0], _target(call)
    if not isinstance(layout_of(x), Sharded):
        # Only view_as and reshape_as get here, with a whole tensor that takes the shape of one with tokens.
        return x.view(sizes) if call.name == "view_as" else x.reshape(sizes)
    if sizes is None:
        call.refuse("reads the memory of tokens as another dtype", "Use .to(dtype) to convert values.")
    tokens = regrouped(global_shape(x), sizes, x.placement.tokens)
    if tokens is None:
        call.refuse(
            f"to {sizes} puts tokens and features on one dim",
            "Keep the tokens' dim, or merge it with the batch's only.",
        )
    layout = x.placement.at(tokens.dim, tokens.outer)
    sizes[tokens.dim] = layout.local_size
    part = plain(x)
    return with_layout(part.view(sizes) if call.name in ("view", "view_as") else part.reshape(sizes), layout)


def _order(call: Call, num_dims: int) -> list[int] | None:
    """The old number of each new dim; None for a call that does not reorder dims."""
    order = list(range(num_dims))
    if call.name in ("transpose", "swapaxes", "swapdims"):
        first, second = call.bind("input dim0 dim1")[1:] if "axis0" not in call.kwargs else call.sizes("axis0 axis1")
        order[first], order[second] = order[second], order[first]
        return order
    if call.name in ("get mT", "get mH", "adjoint"):
        order[-2], order[-1] = order[-1], order[-2]
        return order
    if call.name in ("get T", "t", "get H"):
        return order[::-1]
    if call.name == "permute":
        return [dim % num_dims for dim in call.sizes("dims")]
    if call.name in ("movedim", "moveaxis"):
        source, destination = (
            [one] if isinstance(one, int) else list(one) for one in call.bind("input source destination")[1:]
        )
        source, destination = ([dim % num_dims for dim in dims] for dims in (source, destination))
        rest = [dim for dim in order if dim not in source]
        for at, dim in sorted(zip(destination, source, strict=True)):
            rest.insert(at, dim)
        return rest
    return None


@rule(
    "transpose", "swapaxes", "swapdims", "get mT", "get mH", "adjoint", "get T", "t", "get H", "permute", "movedim",
    "moveaxis",
)  # fmt: skip
def reorder(call: Call) -> Any:
    x = call.args[0]
    order = _order(call, ndim_of(x))
    if order is None:
        raise AssertionError(f"{call.name} is registered as one that reorders dims")
    return with_layout(call.run(), x.placement.at(order.index(x.placement.tokens.dim)))


@rule("unsqueeze")
def unsqueeze(call: Call) -> Any:
    x, dim = call.bind("input dim")
    at, tokens = dim % (ndim_of(x) + 1), x.placement.tokens
    return with_layout(call.run(), x.placement.at(tokens.dim + (at <= tokens.dim)))


def _squeezed(call: Call, shape: Sequence[int]) -> list[int]:
    """The dims that a call removes."""
    dims = call.bind("input dim")[1]
    wanted = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    return [dim % len(shape) for dim in wanted if shape[dim] == 1]


@rule("squeeze")
def squeeze(call: Call) -> Any:
    x = call.args[0]
    shape, tokens = global_shape(x), x.placement.tokens
    gone = _squeezed(call, shape)
    if tokens.dim in gone:  # of one token
        dims = tuple(dim - (dim > tokens.dim) for dim in gone if dim != tokens.dim)
        return x.select(tokens.dim, 0).squeeze(dims)
    return with_layout(
        plain(x).squeeze(tuple(gone)), x.placement.at(tokens.dim - sum(dim < tokens.dim for dim in gone))
    )


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Any:
    x = call.args[0]
    if not isinstance(layout_of(x), Sharded):
        call.refuse("gives a tensor the shape of one with tokens", "Let it be broadcast by the function that uses it.")
    sizes = global_shape(call.args[1]) if call.name == "expand_as" else call.sizes("sizes size")
    num_new, tokens = len(sizes) - ndim_of(x), x.placement.tokens
    at = tokens.dim + num_new
    if sizes[at] not in (-1, tokens.size):
        call.refuse(f"to {sizes} changes the number of tokens", "Keep it.")
    sizes[at] = x.placement.local_size
    return with_layout(plain(x).expand(sizes), x.placement.at(at))


@rule(
    "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "t_", "resize_", "resize_as_", "set_", "set data"
)
def reshaped_in_place(call: Call) -> Any:
    call.refuse("changes the shape of a tensor in place", "Use the function without _.")


@rule("repeat", "tile")
def repeat(call: Call) -> Any:
    x, times = call.args[0], call.sizes("repeats dims")
    num_new = len(times) - ndim_of(x)
    at = x.placement.tokens.dim + num_new
    if num_new < 0 or times[at] != 1:
        call.refuse("repeats tokens", "Repeat other dims only, with one number for each.")
    return with_layout(call.run(), x.placement.at(at))


def followed(call: Call, result: Any) -> TokenDim | None:
    """The dim of tokens in what a function made of whole tensors; None where it is not followed."""
    x = next((one for one in call.args if isinstance(layout_of(one), Replicated)), None)
    if x is None or not is_tensor(result):
        return None
    tokens: TokenDim = x.placement.tokens
    shape = global_shape(x)
    if call.name in _RESHAPES:
        return regrouped(shape, list(result.shape), tokens)
    order = _order(call, len(shape))
    if order is not None:
        return replace(tokens, dim=order.index(tokens.dim))
    if call.name == "unsqueeze":
        return replace(tokens, dim=tokens.dim + (call.bind("input dim")[1] % (len(shape) + 1) <= tokens.dim))
    if call.name == "squeeze":
        gone = _squeezed(call, shape)
        return None if tokens.dim in gone else replace(tokens, dim=tokens.dim - sum(dim < tokens.dim for dim in gone))
    if call.name == "__getitem__" and tokens.outer == 1:
        index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        if all(isinstance(one, slice) or one is Ellipsis for one in index):
            return replace(tokens, length=result.shape[tokens.dim])
    return tokens if list(result.shape) == shape else None
