"""What a compiled module is given in place of its tensors of tokens, while Dynamo captures it and checks its guards.

A stand-in has the shape, dtype, device and order of dims of all tokens, claims their memory and has none: it is never
computed with. Lists, dicts and dataclasses around tokens are copied with stand-ins in them; what the module does to
the copies is done to the user's own after the call.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.call import global_shape
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.tensor import layout_of, plain
from lightning_superscale.torch_private import claimed_memory, tree_leaves, tree_map


class StandIns:
    """The stand-ins of one call of a compiled module.

    Args:
        name: of the module, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._of: dict[int, tuple[Tensor, Tensor]] = {}  # by the tensor's id: it, and its stand-in
        self._behind: dict[int, Tensor] = {}  # by the stand-in's id
        self._copied: list[tuple[Any, Any]] = []  # containers: the user's, and their copy

    def behind(self, x: Any) -> Any:
        """The tensor of a stand-in; anything else is returned itself."""
        return self._behind.get(id(x), x)

    def replace(self, nested: Any) -> Any:
        """The same with stand-ins in place of tensors with a layout; the object itself where it has none."""
        if not has_tokens(nested):
            return nested
        if layout_of(nested) is not None:
            return self._stand_in(nested)
        if not _is_container(nested):
            return tree_map(lambda x: x if x is nested else self.replace(x), nested, is_leaf=lambda x: x is not nested)
        known = next((copied for given, copied in self._copied if given is nested), None)
        if known is not None:
            return known
        copied = copy.copy(nested)
        self._copied.append((nested, copied))
        _fill(copied, {key: self.replace(x) for key, x in _items(nested)})
        return copied

    def restore(self, nested: Any) -> Any:
        """The same with tensors in place of their stand-ins, and the user's containers in place of their copies."""
        owner = next((given for given, copied in self._copied if copied is nested), None)
        if owner is not None:
            return owner
        if isinstance(nested, Tensor):
            return self.behind(nested)
        if not _is_container(nested):
            return tree_map(lambda x: x if x is nested else self.restore(x), nested, is_leaf=lambda x: x is not nested)
        items = list(_items(nested))
        found = {key: self.restore(x) for key, x in items}
        if any(found[key] is not x for key, x in items):
            _fill(nested, found)
        return nested

    def write_back(self) -> None:
        """Do to the user's containers what was done to their copies."""
        for given, copied in self._copied:
            _fill(given, {key: self.restore(x) for key, x in _items(copied)})

    def end(self) -> None:
        """Forget all of them.

        Raises:
            SequenceParallelError: the module registered a hook on one, set an attribute on it, or keeps it: they would
                be lost, since user code has the tensor itself.
        """
        marked = any(one._backward_hooks or vars(one) for _, one in self._of.values())
        kept = [weakref.ref(one) for _, one in self._of.values()]
        self._of.clear()
        self._behind.clear()
        self._copied.clear()
        if marked:
            raise SequenceParallelError(
                f"{self._name} is compiled, and its forward registers a hook, or sets an attribute, on a tensor of "
                "tokens that it was given, in whose place the compiled forward has a stand-in. Do so where the module "
                "is called, or do not compile it."
            )
        if any(one() is not None for one in kept):
            gc.collect()
        left = [x for one in kept if isinstance(x := one(), Tensor)]
        with torch.no_grad():
            for one in left:
                one.set_()  # type: ignore[call-overload]  # who reads it finds nothing, not memory that is not its
        if left:
            raise SequenceParallelError(
                f"{self._name} is compiled, and its forward keeps a tensor of tokens that it was given, as an "
                "attribute of a module, where a stand-in without values is left. Let it keep a result, or do not "
                "compile it."
            )

    def _stand_in(self, x: Tensor) -> Tensor:
        if id(x) not in self._of:
            one = _made_for(x)
            self._of[id(x)] = x, one
            self._behind[id(one)] = x
        return self._of[id(x)][1]


def has_tokens(nested: Any, within: tuple[Any, ...] = ()) -> bool:
    """Whether there is a tensor with a layout in it, however deep.

    Args:
        within: the dataclasses that it is in, which may lead back to themselves.
    """
    return any(
        layout_of(x) is not None
        or (
            _is_container(x)
            and not any(x is outer for outer in within)
            and any(has_tokens(one, (*within, x)) for _, one in _items(x))
        )
        for x in tree_leaves(nested)
    )


def _is_container(x: Any) -> bool:
    """Whether it is of a kind that code may change in place: what is in it, by names or places."""
    if type(x) in (list, dict):
        return True
    is_record = dataclasses.is_dataclass(x) and not isinstance(x, (type, dict, nn.Module))
    return is_record and hasattr(x, "__dict__")


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    if type(container) is list:
        return iter(enumerate(container))
    return iter((container if type(container) is dict else vars(container)).items())


def _fill(container: Any, items: dict[Any, Any]) -> None:
    if type(container) is list:
        container[:] = items.values()
        return
    held = container if type(container) is dict else vars(container)
    held.clear()
    held.update(items)


def _made_for(x: Tensor) -> Tensor:
    part = plain(x)
    if not isinstance(layout_of(x), Sharded):
        return part.detach().requires_grad_(part.requires_grad)
    shape = global_shape(x)
    return claimed_memory(part, shape, _strides_like(part, shape)).requires_grad_(part.requires_grad)


def _strides_like(part: Tensor, shape: list[int]) -> list[int]:
    """The strides of a tensor of this shape without gaps, whose dims are in the order of another's."""
    strides, step = [0] * len(shape), 1
    dims = range(len(shape))
    for dim in reversed(dims) if part.is_contiguous() else sorted(dims, key=lambda dim: (part.stride(dim), -dim)):
        if part.stride(dim) or part.shape[dim] == 1:  # the others are expanded
            strides[dim] = step
            step *= shape[dim]
    return strides
