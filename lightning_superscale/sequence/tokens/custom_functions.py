"""Autograd functions and operations of other packages, which compute with the part of the tokens that a rank has.

[Note: Below the rules] What a class of `torch.autograd.Function` does with its tensors, and what a kernel does with
memory, is not seen by the rules of this room. So a class that gets tokens is refused, unless it hands them on as they
are, as those of checkpoints, module hooks, FSDP and DDP do, or its user says that it treats every token by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import Reduced, Replicated, Sharded
from lightning_superscale.sequence.tokens.nested import leaves_of, map_leaves
from lightning_superscale.sequence.tokens.tensor import entering, layout_of, plain, sharded_in, with_layout
from lightning_superscale.sequence.tokens.traced import is_tensor
from lightning_superscale.torch_private import (
    functions_past_torch_function,
    guard_autograd_functions,
    scripts,
)

# Their functions hand tensors on as they are, or run a module's forward, where rules apply.
_HAND_ON = (
    __name__.partition(".")[0],
    "torch.utils.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed._composable",
    "torch.nn.modules._functions",
    "torch.nn.parallel.distributed",
)


class CustomFunctions:
    """From `install` to `remove`, tokens reach no code that would take a rank's part for all of them.

    Args:
        token_wise: classes that treat every token by itself, as "module.Class", and operations of
            `torch.library`, as "namespace::name". Outputs have the tokens of the first input, on the same dim.
    """

    _installed: CustomFunctions | None = None

    def __init__(self, token_wise: Collection[str] = ()) -> None:
        self._token_wise = frozenset(token_wise)
        self._end_of_guard: Callable[[], None] | None = None
        self._scripts: list[tuple[Any, Any]] = []
        self._functions: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Begin to refuse.

        Raises:
            SequenceParallelError: another run of this process has begun and not ended.
        """
        if CustomFunctions._installed is not None:
            raise SequenceParallelError(
                "another run of this process shares its sequences among ranks; end it before this one begins"
            )
        CustomFunctions._installed = self
        self._end_of_guard = guard_autograd_functions(_guarded, _refuse_past_guard)
        for owner, name in scripts():
            self._scripts.append((owner, owner.__call__))
            owner.__call__ = _without_tokens(owner.__call__, name)
        for module, name in functions_past_torch_function():
            self._functions.append((module, name, vars(module)[name]))
            vars(module)[name] = _without_tokens(vars(module)[name], name)

    def remove(self) -> None:
        """Put torch's functions back; nothing where it was not installed."""
        if CustomFunctions._installed is not self:
            return
        CustomFunctions._installed = None
        if self._end_of_guard is not None:
            self._end_of_guard()
        while self._scripts:
            owner, call = self._scripts.pop()
            owner.__call__ = call
        while self._functions:
            module, name, function = self._functions.pop()
            vars(module)[name] = function


def _is_token_wise(name: str) -> bool:
    guard = CustomFunctions._installed
    return guard is not None and name in guard._token_wise


def _guarded(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.autograd.Function.apply`, for classes that may get tokens."""

    def guarded(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        layouts = _layouts_in(cls, args, kwargs)
        if not layouts:
            return apply(cls, *args, **kwargs)

        def function(*args: Any, **kwargs: Any) -> Any:
            return apply(cls, *args, **kwargs)

        call = Call(function, _name_of(cls), args, kwargs)
        if any(isinstance(layout, Sharded) for layout in layouts):
            return custom(call)
        # Of whole tensors; a value of all tokens gives values of all tokens.
        result = apply(cls, *args, **kwargs)
        mark = next((layout for layout in layouts if isinstance(layout, Reduced)), None)
        if mark is None:
            return result
        return map_leaves(lambda y: with_layout(y, mark) if is_tensor(y) and y.requires_grad else y, result)

    return guarded


def _layouts_in(cls: type[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The layouts of arguments that a function computes with; none for a class that hands them on."""
    if cls.__module__.startswith(_HAND_ON):
        return []
    return [layout for x in leaves_of(args, kwargs) if (layout := layout_of(x)) is not None]


def _name_of(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _refuse_past_guard(cls: type[Any], *args: Any, **kwargs: Any) -> None:
    """Refuse tokens of an application that no guard saw, so that nothing keeps a rank's part from being taken for all.

    Raises:
        SequenceParallelError: the class is not known to treat every token by itself, or was bound to a name before.
    """
    if all(isinstance(layout, Replicated) for layout in _layouts_in(cls, args, kwargs)):
        return
    call = Call(cls, _name_of(cls), args, kwargs)
    if not _is_token_wise(call.name):
        _refuse_unknown(call)
    call.refuse(
        f"was bound to a name before training began, which torch {torch.__version__} calls past every guard",
        f"Call {cls.__qualname__}.apply(...) where it is used, rather than a name that was bound to it.",
    )


def _refuse_unknown(call: Call) -> NoReturn:
    call.refuse(
        "is code below torch's functions, which would compute with this rank's tokens alone",
        f"If it treats every token by itself, name {call.name!r} in SequenceConfig.token_wise.",
    )


def custom(call: Call) -> Any:
    """An autograd function, or an operation of another library, of tokens.

    Raises:
        SequenceParallelError: it is not known to treat every token by itself, or gave another number of them.
    """
    first = call.sharded[0]
    layout: Any = first.placement
    if not _is_token_wise(call.name):
        _refuse_unknown(call)
    if not all(layout.has_same_tokens(x.placement) for x in call.sharded):
        call.refuse("combines a token with another one", "Give it the same tokens of all tensors.")

    def part_of(x: Any) -> Any:
        other = layout_of(x)
        if isinstance(other, Replicated) and other.tokens.size == layout.tokens.size:
            return layout.take(plain(x), other.tokens.dim)
        return plain(entering(x)) if is_tensor(x) else x

    args, kwargs = map_leaves(part_of, (call.args, call.kwargs))
    result = call.func(*args, **kwargs)
    dim, size = layout.tokens.dim, layout.local_size
    for y in leaves_of(result):
        if is_tensor(y) and (y.dim() <= dim or y.shape[dim] != size):
            call.refuse(
                f"gave {list(y.shape)} for {size} tokens of this rank on dim {dim}",
                "Only functions whose outputs have the tokens of their input are token-wise.",
            )
    return call.wrap(result, layout)


def _without_tokens(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that reads tensors past `__torch_function__`."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        if sharded_in((args, kwargs)) and not (len(args) == 1 and not kwargs and name in ("as_tensor", "asarray")):
            Call(function, name, args, kwargs).refuse(
                "takes the memory of a tensor, of which this rank has a part",
                "Use .to() or .detach().clone() for a copy, and torch's functions in place of torch.func.",
            )
        return function(*args, **kwargs)

    return checked
