"""Sums, means and extremes: over features of each token, or over all tokens of all ranks."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.comm.in_graph import all_gather, sum_over_ranks
from lightning_superscale.sequence.tokens.call import Call, global_shape
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.rules.elementwise import elementwise
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import TokenTensor, ndim_of, plain, reduced, with_layout
from lightning_superscale.sequence.tokens.traced import is_tensor
from lightning_superscale.torch_private import without_torch_function

_Dims = list[int]


def _dims(call: Call, names: str) -> tuple[_Dims, bool]:
    """The dims that a call reduces, from 0, and whether it keeps them."""
    given = call.named(names)
    dim, num_dims = given.get("dim"), ndim_of(call.args[0])
    is_all = dim is None or (isinstance(dim, (list, tuple)) and not dim)
    dims = range(num_dims) if is_all else [dim] if isinstance(dim, int) else dim
    return sorted(one % num_dims for one in dims), bool(given.get("keepdim"))  # type: ignore[union-attr]


def _over_features(call: Call, layout: Sharded, dims: _Dims, *, keepdim: bool) -> Any:
    at = layout.tokens.dim - (0 if keepdim else sum(dim < layout.tokens.dim for dim in dims))
    return call.wrap(call.run(), layout.at(at))


def with_value(x: TokenTensor, value: float | bool) -> Tensor:
    """This rank's part, with a value at places outside of the window."""
    layout, part = x.placement, plain(x)
    if not isinstance(layout, Sharded):
        raise AssertionError("only parts have places outside of a window")
    if layout.is_full:
        return part
    return part.masked_fill(~layout.is_token(part), value)


def total(x: TokenTensor, dims: _Dims, *, keepdim: bool, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over dims, the tokens' among them, on every rank; of 16 bits summed up in 32."""
    layout = x.placement
    if not isinstance(layout, Sharded):
        raise AssertionError("only parts are summed up over ranks")
    local = with_value(x, 0)
    wide = torch.float32 if (dtype or local.dtype) in (torch.float16, torch.bfloat16) else dtype
    return reduced(sum_over_ranks(local.sum(dims, keepdim=keepdim, dtype=wide), layout.sharing.link), layout.sharing)


def _dtype_of(call: Call, x: TokenTensor) -> torch.dtype:
    """The dtype of what torch would give, under autocast too."""
    with without_torch_function():
        found: torch.dtype = call.func(plain(x).new_ones(1), dtype=call.kwargs.get("dtype")).dtype
    return found


def count_of(x: TokenTensor, dims: _Dims) -> int:
    """The number of elements, with all tokens, that a reduction of these dims puts together."""
    shape = global_shape(x)
    return prod(shape[dim] for dim in dims)


@rule("sum", "mean")
def add_up(call: Call) -> Any:
    x = call.args[0]
    dims, keepdim = _dims(call, "input dim keepdim")
    layout, dtype = x.placement, call.kwargs.get("dtype")
    if layout.tokens.dim not in dims:
        return _over_features(call, layout, dims, keepdim=keepdim)
    if call.name == "mean" and not (dtype or plain(x).dtype).is_floating_point:
        call.refuse("of integers", "Convert them: .float().")
    summed = total(x, dims, keepdim=keepdim, dtype=dtype)
    if call.name == "mean":
        summed = summed / count_of(x, dims)
    return summed.to(_dtype_of(call, x))


@rule("any", "all", "count_nonzero", "logsumexp")
def counted(call: Call) -> Any:
    x = call.args[0]
    dims, keepdim = _dims(call, "input dim keepdim" if call.name != "count_nonzero" else "input dim")
    layout: Any = x.placement
    if layout.tokens.dim not in dims:
        return _over_features(call, layout, dims, keepdim=keepdim)
    if call.name == "logsumexp":
        parts = with_value(x, -torch.inf).logsumexp(dims, keepdim=keepdim)
        return reduced(all_gather(parts.unsqueeze(0), layout.sharing.link).logsumexp(0), layout.sharing)
    flags = with_layout(plain(x) == 0 if call.name == "all" else plain(x) != 0, layout)
    count = total(flags, dims, keepdim=keepdim)
    if call.name == "count_nonzero":
        return count
    return count == 0 if call.name == "all" else count > 0


class _SameValue(torch.autograd.Function):
    """A value that was found without autograd, with the gradient of another one that is equal to it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, equal: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0]


def _fill_of(x: TokenTensor, *, is_max: bool) -> float | bool:
    """The value that is never the extreme one."""
    dtype = plain(x).dtype
    if dtype == torch.bool:
        return not is_max
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    low, high = (-torch.inf, torch.inf) if dtype.is_floating_point else (info.min, info.max)
    return low if is_max else high


@rule("amax", "amin", "max", "min", "argmax", "argmin")
def extreme(call: Call) -> Any:
    """The extreme of all tokens; with its place, where one dim is reduced."""
    if call.name in ("max", "min") and any(is_tensor(x) for x in (*call.args[1:2], call.kwargs.get("other"))):
        return elementwise(call)
    x = call.args[0]
    dims, keepdim = _dims(call, "input dim keepdim")
    layout: Any = x.placement
    if layout.tokens.dim not in dims:
        return _over_features(call, layout, dims, keepdim=keepdim)
    is_max, gives_place = "max" in call.name, call.name.startswith("arg")
    if gives_place and len(dims) < ndim_of(x) or call.name in ("max", "min") and call.bind("input dim")[1] is not None:
        value, place = _with_place(x, keepdim=keepdim, is_max=is_max)
        if gives_place:
            return place
        return (torch.return_types.max if is_max else torch.return_types.min)((reduced(value, layout.sharing), place))
    if gives_place:
        call.refuse("gives the place of an element among all", "Give it a dim.")
    reduce = torch.amax if is_max else torch.amin
    local = reduce(with_value(x.detach(), _fill_of(x, is_max=is_max)), dims, keepdim=True)
    best = reduce(all_gather(local.unsqueeze(0), layout.sharing.link), 0)
    if plain(x).requires_grad and torch.is_grad_enabled():
        # Equal elements share the gradient, those of other ranks too, as in torch.
        is_best = with_value(with_layout(plain(x) == best, layout), False)
        share = sum_over_ranks(is_best.sum(dims, keepdim=True), layout.sharing.link)
        equal = sum_over_ranks((plain(x).masked_fill(~is_best, 0) / share).sum(dims, keepdim=True), layout.sharing.link)
        best = _SameValue.apply(best, equal)  # type: ignore[no-untyped-call]
    return reduced(best if keepdim else best.squeeze(tuple(dims)), layout.sharing)


def _with_place(x: TokenTensor, *, keepdim: bool, is_max: bool) -> tuple[Tensor, Tensor]:
    """The extreme over the tokens' dim, from the rank that has it, and its place; the first one of equal ones."""
    layout: Any = x.placement
    dim, size, link = layout.tokens.dim, layout.tokens.size, layout.sharing.link
    part = with_value(x, _fill_of(x, is_max=is_max))
    local, at = (torch.max if is_max else torch.min)(part, dim, keepdim=True)
    places = replace(layout, tokens=replace(layout.tokens, dim=0)).take(
        torch.arange(size, device=part.device), fill=size
    )
    values, found = all_gather(local.detach().unsqueeze(0), link), all_gather(places[at].unsqueeze(0), link)
    best = (torch.amax if is_max else torch.amin)(values, 0)
    is_best = (values == best) | (values != values)  # NaN is the extreme of all
    place = found.masked_fill(~is_best, size).amin(0)
    value = sum_over_ranks(local.masked_fill(places[at] != place, 0), link)
    return (value, place) if keepdim else (value.squeeze(dim), place.squeeze(dim))


@rule("var", "std", "var_mean", "std_mean")
def spread(call: Call) -> Any:
    """From the mean of all tokens, and the squares of their distances from it."""
    x, kwargs = call.args[0], dict(call.kwargs)
    rest = list(call.args[1:])
    if rest and isinstance(rest[0], bool):  # of all elements
        kwargs["unbiased"] = rest.pop(0)
    elif len(rest) > 1:
        kwargs["unbiased"] = rest[1]
    dims, _ = _dims(Call(call.func, call.name, (x, *rest[:1]), kwargs), "input dim")
    keepdim = bool(kwargs.get("keepdim", rest[2] if len(rest) > 2 else False))
    if x.placement.tokens.dim not in dims:
        return _over_features(call, x.placement, dims, keepdim=keepdim)
    correction = kwargs.get("correction", 1 if kwargs.get("unbiased", True) else 0)
    mean = x.mean(dims, keepdim=True)
    # The gradient by way of the mean is 0: distances from it add up to nothing.
    squares = ((x - mean.detach()) ** 2).sum(dims, keepdim=keepdim)
    found = squares / max(0, count_of(x, dims) - (1 if correction is None else correction))
    found = _root(found, 2) if call.name.startswith("std") else found
    return (found, mean if keepdim else mean.squeeze(tuple(dims))) if call.name.endswith("mean") else found


@rule("prod", "median", "nanmedian", "mode", "nansum", "nanmean", "kthvalue", "aminmax")
def over_features(call: Call) -> Any:
    x = call.args[0]
    dims, keepdim = _dims(call, "input dim keepdim" if call.name != "kthvalue" else "input k dim keepdim")
    if call.name == "kthvalue" and call.bind("input k dim", dim=-1)[2] == -1:
        dims = [ndim_of(x) - 1]
    if x.placement.tokens.dim in dims:
        call.refuse("over tokens", "Reduce features, or use sum, mean, var, amax or amin over tokens.")
    return _over_features(call, x.placement, dims, keepdim=keepdim)


@rule("norm", "linalg_vector_norm", "linalg_norm", "linalg_matrix_norm")
def norm(call: Call) -> Any:
    order = "p" if call.name == "norm" else "ord"
    x, p, dim, keepdim = call.bind(f"input {order} dim keepdim")
    dims, keepdim = _dims(Call(call.func, call.name, (x,), {"dim": dim, "keepdim": keepdim}), "input dim keepdim")
    if call.name == "linalg_matrix_norm" and dim is None:
        dims = [ndim_of(x) - 2, ndim_of(x) - 1]
    if x.placement.tokens.dim not in dims:
        return _over_features(call, x.placement, dims, keepdim=keepdim)
    is_of_matrix = call.name == "linalg_matrix_norm" or (
        call.name == "linalg_norm" and p is not None and len(dims) == 2
    )
    p = 2 if p in (None, "fro") else p
    if is_of_matrix or not isinstance(p, (int, float)) or p in (torch.inf, -torch.inf, 0):
        call.refuse(f"of order {p} over tokens", "Use the 2-norm of torch.linalg.vector_norm().")
    if call.kwargs.get("dtype") is not None:
        call.refuse("with dtype= over tokens", "Convert the tensor before.")
    powers = total(with_layout(plain(x).abs() ** p, x.placement), dims, keepdim=keepdim)
    return _root(powers, p).to(plain(x).dtype)


def _root(x: Tensor, p: float) -> Tensor:
    """The p-th root, whose gradient is 0 where it has none, at 0, as in torch's norms."""
    is_zero = x == 0
    return (x.masked_fill(is_zero, 1) ** (1 / p)).masked_fill(is_zero, 0)
