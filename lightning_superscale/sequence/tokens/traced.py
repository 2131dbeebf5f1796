"""Tensors with a layout while a compiler traces, and the graph whose functions meet them.

A tracer's tensors are Python objects of classes of its own, which can't be made TokenTensors. Rules need no more of a
tensor than that torch's functions ask its class, which they do of any object, so traced tokens hold a tracer's tensor
and have the functions of a tensor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, fx

from lightning_superscale.sequence.tokens.layout import Layout
from lightning_superscale.sequence.tokens.nested import leaves_of

_T = TypeVar("_T")

# Methods that modes of torch look for, losses' tiles among them, by the function that lets modes see them first.
_SEEN_BY_MODES: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.matmul: torch.matmul,
    Tensor.__matmul__: torch.matmul,
    Tensor.mm: torch.mm,
}


def _dispatched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from lightning_superscale.sequence.tokens.dispatch import dispatch  # rules import this module

    if function in _SEEN_BY_MODES:
        return _SEEN_BY_MODES[function](*args, **kwargs)
    return dispatch(function, args, kwargs)


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    def operator(*args: Any) -> Any:
        return _dispatched(function, *args)

    return operator


# The functions by which Python's operators reach a tensor's class: those of other names, and those of their own.
_RENAMED = {
    **{f"__{one}__": one for one in ("add", "sub", "mul", "pow", "matmul", "neg", "abs", "ne", "lt", "le", "gt", "ge")},
    **{f"__i{one}__": f"{one}_" for one in ("add", "sub", "mul", "pow")},
    **{f"__r{one}__": f"bitwise_{one}" for one in ("and", "or", "xor")},
    **{"__radd__": "add", "__rmul__": "mul", "__truediv__": "div", "__itruediv__": "div_", "__rtruediv__": "__rdiv__"},
    **{"__ifloordiv__": "floor_divide_", "__mod__": "remainder", "__imod__": "remainder_", "__pos__": "positive"},
}
_OWN = (
    *("rsub", "floordiv", "rfloordiv", "rmod", "rpow", "rmatmul", "and", "iand", "or", "ior", "xor", "ixor", "invert"),
    *("lshift", "rlshift", "ilshift", "rshift", "rrshift", "irshift", "eq", "getitem", "setitem", "len", "bool", "int"),
    *("float", "index", "contains", "complex"),
)
_NAMES = {**_RENAMED, **{f"__{one}__": f"__{one}__" for one in _OWN}}
_Operators: Any = type("_Operators", (), {name: _operator(getattr(Tensor, one)) for name, one in _NAMES.items()})


class TracedTokens(_Operators):
    """What a TokenTensor is outside of a tracer.

    Attributes:
        part: the tracer's tensor, of this rank's part.
        placement: where its tokens are.
    """

    def __init__(self, part: Tensor, placement: Layout) -> None:
        self.part = part
        self.placement = placement

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from lightning_superscale.sequence.tokens.dispatch import dispatch

        return dispatch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        found = getattr(Tensor, name)
        return functools.partial(_dispatched, found, self) if callable(found) else _dispatched(found.__get__, self)

    __hash__ = object.__hash__


def called(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of a function of torch; methods of tensors take no traced tokens, which compute by themselves."""
    if any(type(x) is TracedTokens for x in leaves_of(args, kwargs)):
        return _dispatched(function, *args, **kwargs)
    return function(*args, **kwargs)


def is_tensor(x: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor, or traced tokens, which C++ would take for memory if Python said that they are one."""
    return isinstance(x, Tensor) or type(x) is TracedTokens


def part_of_traced(x: _T) -> _T:
    """The tracer's tensor of traced tokens; anything else is returned itself."""
    return cast("Any", x).part if type(x) is TracedTokens else x


class RuledGraph(fx.Interpreter):
    """Runs a graph that Dynamo captured, function by function, so that those that meet tokens go by their rules.

    Args:
        graph: what was captured.
        kind: class of the module whose forward it is.
    """

    def __init__(self, graph: fx.GraphModule, kind: str) -> None:
        super().__init__(graph)
        self.kind = kind
        self.node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def place(self, not_users: Sequence[str]) -> tuple[str, str]:
        """The class of the module, and the line of user code, that the present function was captured from.

        Args:
            not_users: folders whose lines are no user's.
        """
        lines = re.findall(r'File "([^"]+)", line (\d+)', (self.node and self.node.stack_trace) or "")
        users = [f"{file}:{number}" for file, number in lines if not file.startswith(tuple(not_users))]
        modules = list(self.node.meta.get("nn_module_stack", {}).values()) if self.node else []
        kind = modules[-1][1] if modules else self.kind
        return kind if isinstance(kind, str) else kind.__name__, users[-1] if users else ""
