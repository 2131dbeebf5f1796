"""Indexing: any of the other dims, a window of the tokens, or one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.sequence.tokens.call import Call, global_shape
from lightning_superscale.sequence.tokens.layout import Reduced, Sharded
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import TokenTensor, is_sharded, ndim_of, plain, reduced, with_layout
from lightning_superscale.sequence.tokens.traced import is_tensor


def cut(call: Call, x: TokenTensor, first: int, last: int) -> TokenTensor:
    """The tokens from `first` to `last`, which moves no data."""
    layout = x.placement
    if not isinstance(layout, Sharded):
        raise AssertionError("rules cut sharded tensors")
    if layout.tokens.outer > 1:
        call.refuse("cuts a dim of several sequences' tokens", "Cut the sequences before they are put on one dim.")
    if last <= first:
        call.refuse("leaves no token", "Keep some.")
    return with_layout(plain(x), layout.window(first, last - first))


def one_token(call: Call, x: TokenTensor, index: int) -> Tensor:
    """One token of every sequence, on every rank."""
    layout = x.placement
    if not isinstance(layout, Sharded):
        raise AssertionError("rules take tokens of sharded tensors")
    if layout.tokens.outer > 1:
        call.refuse("takes one token of several sequences", "Take it before sequences are put on one dim.")
    at = index + layout.tokens.length if index < 0 else index
    if not 0 <= at < layout.tokens.length:
        raise IndexError(f"index {index} is out of bounds for {layout.tokens.length} tokens")
    # Also without a gradient: it has to be known for a copy, to which nothing may write.
    return with_layout(layout.token(plain(x), at), Reduced(layout.sharing, is_copy=True))


def _by_dim(call: Call, num_dims: int) -> list[Any]:
    """The parts of an index, with as many full slices in place of an ellipsis as there are dims left."""
    index = call.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    places = [at for at, part in enumerate(parts) if part is Ellipsis]
    at = places[0] if places else len(parts)
    rest = num_dims - sum(part is not None and part is not Ellipsis for part in parts)
    return [*parts[:at], *[slice(None)] * rest, *parts[at + len(places) :]]


def _place_of(parts: Sequence[Any], dim: int) -> int:
    """The place in an index of the part for a dim."""
    dims = [at for at, part in enumerate(parts) if part is not None]
    return dims[dim]


@rule("__getitem__")
def getitem(call: Call) -> Any:
    x = call.args[0]
    if not is_sharded(x):
        call.refuse("looks up a whole tensor by tokens' values", "Use torch.nn.functional.embedding.")
    num_dims, tokens = ndim_of(x), x.placement.tokens
    parts = _by_dim(call, num_dims)
    at = _place_of(parts, tokens.dim)
    if any((is_tensor(part) or isinstance(part, (list, bool, range))) for part in parts):
        return picked(call, x, parts, at)
    mine, parts[at] = parts[at], slice(None)
    new_dim = sum(part is None or isinstance(part, slice) for part in parts[:at])
    if isinstance(mine, slice):
        first, last, step = mine.indices(tokens.size)
        if step != 1:
            call.refuse("takes every n-th token", "Take all of them.")
        if (first, last) != (0, tokens.size):
            x = cut(call, x, first, last)
        return with_layout(plain(x)[tuple(parts)], x.placement.at(new_dim))
    with_tokens = with_layout(plain(x)[tuple(parts)], x.placement.at(new_dim))
    return one_token(call, with_tokens, int(mine))


def picked(call: Call, x: TokenTensor, parts: list[Any], at: int) -> Any:
    """Elements that tensors of indices name: of features, or tokens, which every rank gets then.

    Args:
        at: the place of the tokens' dim among the parts.
    """
    layout: Any = x.placement
    named = [number for number, part in enumerate(parts) if not isinstance(part, slice)]
    tensors = [torch.as_tensor(plain(part)) for part in (parts[number] for number in named) if part is not None]
    if any(is_sharded(part) for part in parts) or any(one.dtype == torch.bool for one in tensors):
        call.refuse(
            "picks by values of tokens, or by a mask: each rank would find other numbers of tokens",
            "Keep the shape: labels of -100 leave tokens out of a loss, and torch.where() out of sums.",
        )
    if len(tensors) < len(named) or named[-1] - named[0] >= len(named) or layout.tokens.outer > 1:
        call.refuse("picks by tensors on dims apart from one another", "Index one dim after the other.")
    for number, one in zip(named, tensors, strict=True):
        parts[number] = one.to(plain(x).device)
    if at in named:
        parts[at] = parts[at] + (parts[at] < 0) * layout.tokens.length
        return reduced(layout.pick(plain(x), tuple(parts), at), layout.sharing)
    shape = torch.broadcast_shapes(*(one.shape for one in tensors))  # type: ignore[no-untyped-call]
    new_dim = at + (len(shape) - len(named) if at > named[0] else 0)
    return with_layout(plain(x)[tuple(parts)], layout.at(new_dim))


@rule("__setitem__")
def setitem(call: Call) -> Any:
    """Writes to a window of the tokens, or to features of each."""
    x, index, value = call.args
    mask = index if is_tensor(index) and index.dtype == torch.bool else None
    if mask is not None and (not is_tensor(value) or value.dim() == 0):
        x.masked_fill_(mask[(slice(None),) * mask.dim() + (None,) * (x.dim() - mask.dim())], value)
        return
    parts = _by_dim(call, ndim_of(x))
    at = _place_of(parts, x.placement.tokens.dim)
    if any((is_tensor(part) or isinstance(part, (list, bool, range))) for part in parts):
        call.refuse("writes where a tensor says", "Use torch.where().")
    if not isinstance(parts[at], slice):
        if is_tensor(value) and value.dim() > 0:
            call.refuse("writes to one token", "Use torch.where() on all tokens.")
        first = int(parts[at]) % x.placement.tokens.size
        parts[at] = slice(first, first + 1)
    view = x[tuple(parts)]
    if is_tensor(value):
        view.copy_(value)
    else:
        view.fill_(value)


@rule("narrow")
def narrow(call: Call) -> Any:
    x, dim, start, length = call.bind("input dim start length")
    if dim % ndim_of(x) != x.placement.tokens.dim:
        return with_layout(call.run(), x.placement)
    size = global_shape(x)[x.placement.tokens.dim]
    start += size if start < 0 else 0
    if not 0 <= start <= start + length <= size:
        raise IndexError(f"start {start} and length {length} are out of bounds for {size} tokens")
    return cut(call, x, start, start + length)


@rule("select")
def select(call: Call) -> Any:
    x, dim, index = call.bind("input dim index")
    dim, tokens = dim % ndim_of(x), x.placement.tokens
    if dim == tokens.dim:
        return one_token(call, x, index)
    return with_layout(call.run(), x.placement.at(tokens.dim - (dim < tokens.dim)))
