"""Finds the rule of a function, and computes with tensors of which every rank has all tokens without one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.call import Call, call_of
from lightning_superscale.sequence.tokens.custom_functions import custom
from lightning_superscale.sequence.tokens.layout import Reduced, Replicated, Sharded
from lightning_superscale.sequence.tokens.nested import leaves_of, map_leaves
from lightning_superscale.sequence.tokens.rules.registry import ENTRIES, rule_of
from lightning_superscale.sequence.tokens.rules.views import followed
from lightning_superscale.sequence.tokens.tensor import layout_of, mean_over_ranks, plain, reduced
from lightning_superscale.sequence.tokens.traced import TracedTokens, is_tensor, part_of_traced
from lightning_superscale.sequence.whole import are_whole
from lightning_superscale.torch_private import is_compiling, without_torch_function

# These run Python code of their own, in which tensors must keep their layouts: a checkpoint computes forward again.
_RUN_BACKWARD = ("backward", "grad")


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a function of torch whose arguments have a layout.

    Raises:
        SequenceParallelError: no rule says how each rank computes its part.
    """
    if is_compiling():  # nothing is asked of the arguments, because that would lead here again
        raise SequenceParallelError(
            f"{name_of(func)} meets a tensor of tokens in a function that torch.compile compiles, which knows nothing "
            "of tensors of which ranks have parts. Remove torch.compile there, or train with sequence=1. Only "
            "flex_attention may be compiled, by itself: bind it to a name of a module of Python, or to an attribute of "
            "a layer, before training begins."
        )
    call = call_of(func, name_of(func), args, kwargs)
    if call.name in _RUN_BACKWARD:
        return _backward(call)
    leaves = leaves_of(args, kwargs)
    of_kinds = {type(layout): layout for x in reversed(leaves) if (layout := layout_of(x)) is not None}
    has_part = Sharded in of_kinds
    _check_writes(call, has_part=has_part, has_reduced=Reduced in of_kinds)
    if has_part:
        return (custom if "::" in call.name else rule_of(call))(call)
    replicated: Any = of_kinds.get(Replicated)
    if replicated is not None and call.name in ENTRIES and not are_whole():
        return rule_of(call)(call)
    from_reduced: Any = of_kinds.get(Reduced)
    if any(type(x) is TracedTokens for x in leaves):
        args, kwargs = map_leaves(part_of_traced, (args, kwargs))
    with without_torch_function():
        result = func(*args, **kwargs)
    if from_reduced is not None:
        return map_leaves(lambda x: reduced(x, from_reduced.sharing) if is_tensor(x) else x, result)
    if replicated is not None and not are_whole():
        tokens = followed(call, result)
        if tokens is not None:
            return call.wrap(result, Replicated(tokens, replicated.sharing))
    return result


def _check_writes(call: Call, *, has_part: bool, has_reduced: bool) -> None:
    """Refuse to write tokens, or a value of all of them, where they would lose their layout."""
    if has_part and call.kwargs.get("out") is not None:
        call.refuse("writes to out=", "Use the result.")
    if not call.is_in_place:
        return
    layout = layout_of(call.args[0]) if call.args else None
    if isinstance(layout, Reduced) and layout.is_copy:
        call.refuse("writes to single tokens, which are a copy here", "Use torch.where() on all tokens.")
    if has_part and not isinstance(layout, Sharded):
        call.refuse(
            "writes tokens into a tensor that every rank has whole",
            "Use the function without _, or make the tensor with torch.zeros_like() of one with tokens.",
        )
    if has_reduced and not isinstance(layout, (Sharded, Reduced)):
        call.refuse("writes a value of all tokens into another tensor", "Use the function without _, or a = a + b.")


def _backward(call: Call) -> Any:
    """Run a backward of losses; a checkpoint that is computed again finds layouts where forward did."""
    if call.kwargs.get("create_graph"):
        call.refuse("with create_graph=True goes back through collectives twice", "Leave it out.")
    inputs = call.kwargs.get("inputs", call.args[1] if call.name == "grad" and len(call.args) > 1 else None)
    if any(layout_of(x) is not None for x in leaves_of(inputs)):
        call.refuse(
            "asks for the gradient of a value of tokens",
            "Ask for those of parameters, or register a hook on the value.",
        )
    # Inside a backward, where checkpoints run another one, autograd is off, and would lose what is made plain.
    with torch.enable_grad():
        args, kwargs = map_leaves(plain, (call.args, call.kwargs))
    grads = call.func(*args, **kwargs)
    if call.name == "backward":
        return grads
    # What autograd has is of this rank's tokens ([Note: One loss contract]); their mean is that of all.
    link = next(
        layout for x in leaves_of(args, kwargs, call.args, call.kwargs) if (layout := layout_of(x)) is not None
    ).sharing.link
    return map_leaves(lambda grad: mean_over_ranks(grad, link) if is_tensor(grad) else grad, grads)


def name_of(func: Callable[..., Any]) -> str:
    """The name under which rules are registered: of a property "get shape", of torch.ops.aten.add.Tensor "add"."""
    # Those of torch itself are few and asked for at every call; a user's would be kept alive.
    return _name_of_builtin(func) if type(func) in _BUILTIN else _name_of(func)


def _name_of(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):
        return f"{name.strip('_')} {func.__self__.__name__}"  # type: ignore[attr-defined]
    namespace = str(getattr(func, "_qualified_op_name", "") or getattr(func, "_schema", "")).partition("::")[0]
    if namespace and namespace != "aten":
        return f"{namespace}::{name.partition('.')[0]}"
    return name.partition(".")[0]


_name_of_builtin = functools.lru_cache(maxsize=4096)(_name_of)
_BUILTIN = frozenset({type(torch.relu), type(Tensor.add), type(Tensor.__add__), type(Tensor.shape.__get__)})  # type: ignore[attr-defined]
