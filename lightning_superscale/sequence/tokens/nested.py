"""Arguments and results of functions, nested in tuples, lists and dicts, quicker than by torch's own functions.

Every function of torch that meets tokens is asked for its arguments several times, and a model calls hundreds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_superscale.torch_private import tree_leaves, tree_map

# Known without a search; tensor.py adds its own.
LEAVES: set[type] = {
    *(Tensor, nn.Parameter, int, float, bool, str, type(None), slice, type(...), torch.dtype, torch.device)
}


def leaves_of(*nests: Any) -> list[Any]:
    """The leaves of tuples, lists, dicts, and of other kinds that torch takes apart; in order."""
    found: list[Any] = []
    for nested in nests:
        _add_leaves(nested, found)
    return found


def _add_leaves(nested: Any, found: list[Any]) -> None:
    kind = type(nested)
    if kind is tuple or kind is list:
        for x in nested:
            if type(x) in LEAVES:
                found.append(x)
            else:
                _add_leaves(x, found)
    elif kind is dict:
        for x in nested.values():
            _add_leaves(x, found)
    elif kind in LEAVES or isinstance(nested, Tensor):
        found.append(nested)
    else:
        found.extend(tree_leaves(nested))


def map_leaves(function: Callable[[Any], Any], nested: Any) -> Any:
    """The same nest with what the function makes of each leaf."""
    kind = type(nested)
    if kind in LEAVES:
        return function(nested)
    if kind is tuple or kind is list:
        mapped = [function(x) if type(x) in LEAVES else map_leaves(function, x) for x in nested]
        return tuple(mapped) if kind is tuple else mapped
    if kind is dict:
        return {key: map_leaves(function, x) for key, x in nested.items()}
    return function(nested) if isinstance(nested, Tensor) else tree_map(function, nested)
