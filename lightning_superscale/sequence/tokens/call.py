"""One call of a function of torch with tensors that have a layout: what a rule gets, and how it refuses."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.layout import Layout, Sharded
from lightning_superscale.sequence.tokens.nested import leaves_of, map_leaves
from lightning_superscale.sequence.tokens.tensor import (
    TokenTensor,
    entering,
    layout_of,
    part_shape,
    sharded_in,
    with_layout,
)
from lightning_superscale.sequence.tokens.traced import RuledGraph, is_tensor
from lightning_superscale.torch_private import without_torch_function

# Code of these folders is not where a user looks for the line that called a function.
_NOT_USERS = (str(Path(str(torch.__file__)).parent), str(Path(__file__).parents[2]))


# Functions that change their first argument, besides those whose names end with "_".
_OPERATORS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = frozenset([*(f"__i{name}__" for name in _OPERATORS), "__setitem__", "set data"])


class Call(NamedTuple):
    """A call of one function.

    Attributes:
        func: the function of torch.
        name: as rules are registered: "add" for `torch.add`, `Tensor.add`, `+` and `torch.ops.aten.add`.
        args, kwargs: of the call.
    """

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def is_in_place(self) -> bool:
        """Whether the function changes its first argument."""
        return _is_in_place(self.name)

    @property
    def sharded(self) -> list[TokenTensor]:
        """The sharded tensors among the arguments, in order."""
        return sharded_in((self.args, self.kwargs))

    def bind(self, names: str, **defaults: Any) -> list[Any]:
        """The arguments of these names, in this order.

        Args:
            names: of the function's parameters in order, with spaces between them.
            defaults: of those that may be missing; None for others.
        """
        split = _split(names)
        bound = list(self.args[: len(split)])
        for name in split[len(bound) :]:
            bound.append(self.kwargs[name] if name in self.kwargs else defaults.get(name))
        return bound

    def named(self, names: str, **defaults: Any) -> dict[str, Any]:
        """The arguments of these names, by name; see `bind`."""
        return dict(zip(_split(names), self.bind(names, **defaults), strict=True))

    def sizes(self, names: str = "size") -> list[Any]:
        """The arguments after the tensor, given one by one, as a sequence, or by name."""
        rest = self.args[1:] or tuple(self.kwargs[name] for name in names.split() if name in self.kwargs)
        one = rest[0] if len(rest) == 1 else rest
        return list(one) if isinstance(one, (tuple, list)) else [one]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the function with other arguments, or with those of the call if none is given: plain tensors.

        Sharded tensors are computed with as this rank's part.
        """
        if not args and not kwargs:
            args, kwargs = self.args, self.kwargs
        args = map_leaves(_entering, args)
        kwargs = map_leaves(_entering, kwargs) if kwargs else kwargs
        with without_torch_function():
            return self.func(*args, **kwargs)

    def wrap(self, result: Any, layout: Layout) -> Any:
        """A result with this layout: of each tensor of it, where there are several."""
        return map_leaves(lambda x: with_layout(x, layout) if is_tensor(x) else x, result)

    def refuse(self, why: str, instead: str) -> NoReturn:
        """Refuse the call.

        Args:
            why: completes a sentence that begins with the function.
            instead: what the user can do.

        Raises:
            SequenceParallelError: names function, shapes, module and line.
        """
        shown = ", ".join(_shown(x) for x in leaves_of(self.args, self.kwargs) if is_tensor(x))
        raise SequenceParallelError(
            f"{self.name}({shown}) {why}{_where()}. {instead} The strategy's sequence= shares the tokens of each "
            "sample among ranks."
        )


@functools.cache
def _is_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


@functools.cache
def _split(names: str) -> list[str]:
    return names.split()


def _entering(x: Any) -> Any:
    return entering(x) if is_tensor(x) else x


def _shown(x: Tensor) -> str:
    layout, shape = layout_of(x), list(x.shape)
    return f"{shape} with tokens on dim {layout.tokens.dim}" if isinstance(layout, Sharded) else f"{shape}"


def _where() -> str:
    """The line of user code that made the call, and the module whose forward it is in."""
    frame, line, module = sys._getframe(1), "", ""
    while frame is not None and not (line and module):
        owner = frame.f_locals.get("self")
        if isinstance(owner, RuledGraph):  # its own lines are those of a captured graph
            kind, place = owner.place(_NOT_USERS)
            return f" in {kind.rpartition('.')[2]}" * bool(kind) + f" at {place}" * bool(place)
        if not module and isinstance(owner, nn.Module):
            module = f" in {type(owner).__name__}"
        if not line and not frame.f_code.co_filename.startswith(_NOT_USERS):
            line = f" at {frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return f"{module}{line}"


def is_called_by_torch() -> bool:
    """Whether code of torch, such as a checkpoint, called the function whose rule runs."""
    # torch's own methods, written in Python, lie between a rule and who called them.
    between = (_NOT_USERS[1], *(f"{_NOT_USERS[0]}/{name}.py" for name in ("_tensor", "overrides")))
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(between):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith(_NOT_USERS[0])


# What torch's functions call their first tensor, and the names that NumPy has for some parameters.
_FIRST = ("condition", "query", "input", "self", "tensor", "tensors", "x", "a", "x1")
_NUMPYS = {"axis": "dim", "keepdims": "keepdim"}


def call_of(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call whose first argument has no name, and whose others have torch's own names."""
    if not kwargs:
        return Call(func, name, args, kwargs)
    kwargs = {_NUMPYS.get(key, key): value for key, value in kwargs.items()}
    first = next((key for key in _FIRST if key in kwargs), None)
    if not args and first is not None:
        args = (kwargs.pop(first),)
    return Call(func, name, args, kwargs)


def global_shape(x: Tensor) -> list[int]:
    """The sizes of a tensor, with all tokens."""
    layout, shape = layout_of(x), list(part_shape(x))
    if isinstance(layout, Sharded):
        shape[layout.tokens.dim] = layout.tokens.size
    return shape
