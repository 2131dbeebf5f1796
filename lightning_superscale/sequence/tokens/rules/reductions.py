"""Sums, means and extremes: over features of each token, or over all tokens of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_superscale.comm.in_graph import all_gather, sum_over_ranks
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.rules.elementwise import elementwise
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import TokenTensor, is_sharded, plain, reduced, with_layout
from lightning_superscale.torch_private import tree_map

_Dims = list[int]


def _dims(call: Call, names: str) -> tuple[_Dims, bool]:
    """The dims that a call reduces, from 0, and whether it keeps them."""
    x = call.args[0] if call.args else call.kwargs["input"]
    given = dict(zip(names.split(), call.bind(names), strict=True))
    dim, num_dims = given.get("dim"), plain(x).dim()
    dim = given.get("axis") if dim is None else dim
    is_all = dim is None or (isinstance(dim, (list, tuple)) and not dim)
    dims = range(num_dims) if is_all else [dim] if isinstance(dim, int) else dim
    return sorted(one % num_dims for one in dims), bool(given.get("keepdim"))  # type: ignore[union-attr]


def _over_features(call: Call, layout: Sharded, dims: _Dims, *, keepdim: bool) -> Any:
    at = layout.tokens.dim - (0 if keepdim else sum(dim < layout.tokens.dim for dim in dims))
    return tree_map(lambda y: with_layout(y, layout.at(at)) if isinstance(y, Tensor) else y, call.run())


def with_value(x: TokenTensor, value: float | bool) -> Tensor:
    """This rank's part, with a value at places outside of the window."""
    layout, part = x.placement, plain(x)
    if not isinstance(layout, Sharded):
        raise AssertionError("only parts have places outside of a window")
    if layout.is_full:
        return part
    shape = [1] * part.dim()
    shape[layout.tokens.dim] = -1
    return part.masked_fill(~layout.is_token(part.device).view(shape), value)


def total(x: TokenTensor, dims: _Dims, *, keepdim: bool, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over dims, the tokens' among them, on every rank."""
    layout = x.placement
    if not isinstance(layout, Sharded):
        raise AssertionError("only parts are summed up over ranks")
    local = with_value(x, 0).sum(dims, keepdim=keepdim, dtype=dtype)
    return reduced(sum_over_ranks(local, layout.sharing.link), layout.sharing)


@rule("sum", "mean")
def add_up(call: Call) -> Any:
    x = call.args[0]
    names = "input dim keepdim" if "axis" not in call.kwargs else "input axis keepdim"
    dims, keepdim = _dims(call, names)
    layout, dtype = x.placement, call.kwargs.get("dtype")
    if layout.tokens.dim not in dims:
        return _over_features(call, layout, dims, keepdim=keepdim)
    summed = total(x, dims, keepdim=keepdim, dtype=dtype)
    if call.name == "sum":
        return summed
    count = layout.tokens.size
    for dim in dims:
        count *= 1 if dim == layout.tokens.dim else plain(x).shape[dim]
    return summed / count


_EXTREMES = {"amax": -torch.inf, "max": -torch.inf, "amin": torch.inf, "min": torch.inf}


@rule("amax", "amin", "max", "min", "any", "all", "logsumexp", "count_nonzero")
def extreme(call: Call) -> Any:
    """Over tokens: each rank's result, and then the same over ranks."""
    if call.name in ("max", "min") and any(
        isinstance(one, Tensor) for one in (*call.args[1:2], call.kwargs.get("other"))
    ):
        return elementwise(call)
    x = call.args[0]
    dims, keepdim = _dims(call, "input dim keepdim")
    layout: Any = x.placement
    if layout.tokens.dim not in dims:
        return _over_features(call, layout, dims, keepdim=keepdim)
    if call.name in ("max", "min") and len(dims) < plain(x).dim():
        call.refuse("gives the place of a token", f"Use .a{call.name}(), which gives values only.")
    if call.name == "count_nonzero":
        return total(with_layout(plain(x) != 0, layout), dims, keepdim=False)
    return reduced(_over_ranks(call.name, x, dims, keepdim=keepdim), layout.sharing)


def _over_ranks(name: str, x: TokenTensor, dims: _Dims, *, keepdim: bool) -> Tensor:
    link = x.placement.sharing.link
    if name in ("any", "all"):
        flags = with_value(x, name == "all").bool()
        missed = (~flags if name == "all" else flags).sum(dims, keepdim=keepdim)
        count = sum_over_ranks(missed, link)
        return count == 0 if name == "all" else count > 0
    fill = -torch.inf if name == "logsumexp" else _EXTREMES[name]
    if not plain(x).is_floating_point():
        info = torch.iinfo(plain(x).dtype)
        fill = info.min if fill < 0 else info.max
    function = {"max": "amax", "min": "amin"}.get(name, name)
    local = getattr(torch, function)(with_value(x, fill), dims, keepdim=keepdim)
    result: Tensor = getattr(torch, function)(all_gather(local.unsqueeze(0), link), 0)
    return result


@rule(
    "argmax", "argmin", "prod", "var", "std", "var_mean", "std_mean", "median", "mode", "nansum", "nanmean", "kthvalue"
)
def over_features(call: Call) -> Any:
    x = call.args[0]
    dims, keepdim = _dims(call, "input dim keepdim" if call.name != "kthvalue" else "input k dim keepdim")
    if x.placement.tokens.dim in dims:
        call.refuse("over tokens", "Reduce features, or use sum, mean, amax or amin over tokens.")
    keepdim = keepdim or bool(call.kwargs.get("keepdim"))
    return _over_features(call, x.placement, dims, keepdim=keepdim)


@rule("norm", "linalg_vector_norm", "linalg_norm")
def norm(call: Call) -> Any:
    order = "p" if call.name == "norm" else "ord"
    x, p, dim, keepdim = call.bind(f"input {order} dim keepdim")
    p = 2 if p in (None, "fro") else p
    dims, keepdim = _dims(Call(call.func, call.name, (x,), {"dim": dim, "keepdim": keepdim}), "input dim keepdim")
    if not is_sharded(x) or not isinstance(p, (int, float)) or p in (torch.inf, -torch.inf, 0):
        call.refuse(f"of order {p}", "Use the 2-norm.")
    if x.placement.tokens.dim not in dims:
        return _over_features(call, x.placement, dims, keepdim=keepdim)
    powers = with_layout(plain(x).abs() ** p, x.placement)
    return total(powers, dims, keepdim=keepdim) ** (1 / p)
