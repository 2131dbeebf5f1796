"""Reads calls that make, view, cut or convert logits [..., classes]: of what, and what shape and dtype they ask for."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.rules.views import flattened, resolved
from lightning_superscale.sequence.tokens.tensor import TokenTensor, layout_of, ndim_of, part_shape, plain
from lightning_superscale.sequence.tokens.traced import TracedTokens
from lightning_superscale.torch_private import is_fake

PRODUCTS = frozenset({functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})
"""Functions that make logits of tokens and a weight."""

CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
"""Dtypes by the methods that convert to them."""


def keeps_classes(index: Any, num_dims: int) -> bool:
    """Whether an index consists of slices that leave the last dim as it is."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(part, slice) or part is Ellipsis for part in parts) or parts.count(Ellipsis) > 1:
        return False
    if Ellipsis not in parts:
        return len(parts) < num_dims or parts[-1] == slice(None)
    return parts[-1] is Ellipsis and len(parts) <= num_dims or parts[-1] == slice(None)


def cast_to(call: Call, x: Tensor) -> torch.dtype | None:
    """The dtype that a call converts logits to; None where it does more."""
    if call.name in CASTS:
        return CASTS[call.name] if len(call.args) == 1 and not call.kwargs else None
    found = x.dtype
    for value in (*call.args[1:], *(call.kwargs.get(key) for key in ("dtype", "device"))):
        if isinstance(value, torch.dtype):
            found = value
        elif isinstance(value, (str, torch.device)):
            if torch.device(value) not in (x.device, torch.device(x.device.type)):
                return None
        elif value is not None:
            return None
    return found if call.kwargs.keys() <= {"dtype", "device", "non_blocking"} else None


def sizes_of(call: Call, shape: list[int]) -> list[int] | None:
    """The sizes that a reshape asks for."""
    if call.name == "flatten":
        return flattened(call, shape)
    sizes = call.sizes("shape size")
    if not all(isinstance(size, int) for size in sizes) or sizes.count(-1) > 1:
        return None
    return resolved(sizes, prod(shape))


def puts_classes_on_1(call: Call) -> bool:
    """Whether a call on [B, S, V] returns [B, V, S]."""
    if call.name == "get mT":
        return True
    numbers = [dim % 3 if isinstance(dim, int) else None for dim in call.sizes("dims")]
    return numbers == [0, 2, 1] if call.name == "permute" else set(numbers) == {1, 2} and len(numbers) == 2


def _is_plain(x: Any) -> bool:
    """Whether it is a tensor or a parameter, watched perhaps ([Note: Watched weights] in optim), of no other class; or
    stands for one without values.
    """
    return getattr(type(x), "plain_class", type(x)) in (Tensor, nn.Parameter) or is_fake(x)


def operands_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Tokens [..., H], a weight [V, H] that is a parameter or a view of one, and a bias; None if a call has others."""
    x: Any
    weight: Any
    bias: Any = None
    if func is functional.linear:
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        x, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    elif len(args) == 2 and not kwargs:
        x, weight = args
        weight = weight.t() if _is_plain(weight) and weight.dim() == 2 else None
    else:
        return None
    if (
        not (type(x) in (Tensor, TokenTensor, TracedTokens) or is_fake(x))
        or not _is_plain(weight)
        or not plain(x).is_floating_point()
    ):
        return None
    if not (bias is None or _is_plain(bias)):
        return None
    layout = layout_of(x)
    has_tokens = ndim_of(x) > 1 and weight.dim() == 2 and part_shape(x)[-1] == weight.shape[1]
    if isinstance(layout, Sharded):
        has_tokens &= layout.tokens.dim < ndim_of(x) - 1
    is_param = isinstance(weight if weight._base is None else weight._base, nn.Parameter)
    if not has_tokens or not is_param or not (layout is None or isinstance(layout, Sharded)):
        return None
    return x, weight, bias
