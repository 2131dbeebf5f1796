"""Operations of user code on weights that are sharded: those that mean the whole weight work, others say what to do.

[Note: Operations on shards] Between forward and step a weight of ZeRO-3 is a DTensor of this rank's rows, and user code
anywhere (a step, a hook, a callback) may take it for the whole weight. Torch hands every operation on it to the
weight's class (`param_classes.py`), and so to `operate`. Whatever follows of an operation on a weight is of that class,
too, so that an error names the weight however late it comes.

- A number (a norm, a sum, a maximum) without gradient becomes an ordinary tensor, equal on every rank.
- An operation in place takes tensors of the weight's shape, which are cut as the weight is.
- An operation that torch has no way to run on rows runs on the whole weight, if no gradient is asked for.
- A gradient that goes to a weight past its module is refused: it would not be averaged as the others are.

All that is decided by shapes and settings, which are equal on all ranks, so that ranks gather together or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.dtensor import local_part, placed_like
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.torch_private import plainly, tree_leaves, tree_map

# Parts of the messages of errors that torch raises on all ranks alike, because it has no way to run an operation.
_MIXED = "got mixed torch.Tensor and DTensor"
_NO_WAY = (_MIXED, "Sharding propagation failed", "sharding strategy", "unevenly sharded", "for tensor subclasses")
_READS_ALL = (Tensor.numpy, Tensor.tolist, Tensor.__array__)
_READS_MEMORY = (Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage)
_NOT_IN_GRAPH = "appears to not have been used in the graph"

FULL_PARAMS = "`with strategy.full_params() as weights:`, entered by every rank, gives whole weights by name"


def operate(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], name_of: Callable[[DTensor], str]) -> Any:
    """The result of an operation that reads a sharded weight, or what follows of one.

    Args:
        name_of: gives the name of the weight that a tensor is, or was computed from; "" for others.

    Raises:
        SuperScaleError: the operation means the whole weight, and can't have it; names the weight and what to do.
    """
    leaves = tree_leaves((args, kwargs))
    shards = [leaf for leaf in leaves if isinstance(leaf, DTensor)]
    named = next((shard for shard in shards if name_of(shard)), None)
    if named is None:
        return plainly(func, *args, **kwargs)
    name = name_of(named)
    is_differentiated = torch.is_grad_enabled() and any(shard.requires_grad for shard in shards)
    is_in_loss = is_differentiated and func is not torch.autograd.grad and any(_is_loss(leaf) for leaf in leaves)
    if is_in_loss or func is Tensor.backward:
        raise _gradient_past_module(func, name, named, leaves)
    if func in _READS_MEMORY:
        raise _no_memory(name)
    if func in _READS_ALL:
        return func(cast(DTensor, named.detach()).full_tensor(), *args[1:], **kwargs)
    try:
        result = plainly(func, *args, **kwargs)
    except RuntimeError as error:
        if isinstance(error, SuperScaleError | torch.OutOfMemoryError | torch.distributed.DistError):
            raise
        if not any(words in str(error) for words in _NO_WAY):
            raise _explained(func, name, error) from error
        if is_differentiated:
            raise _gradient_past_module(func, name, named, leaves) from error
        return _operate_on_whole(func, args, kwargs, name, error)
    return tree_map(lambda value: _without_parts(value) if isinstance(value, DTensor) else value, result)


def _is_loss(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and leaf.requires_grad


def _without_parts(value: DTensor) -> Tensor:
    """A number without gradient as an ordinary tensor; other tensors as they are."""
    if value.ndim or value.requires_grad:
        return value
    with torch.no_grad():
        return value.full_tensor()


def _operate_on_whole(
    func: Callable[..., Any], args: Any, kwargs: dict[str, Any], name: str, error: RuntimeError
) -> Any:
    """Run an operation that torch can't run on rows: in place on rows of all tensors, otherwise on whole weights."""
    target = args[0] if args and isinstance(args[0], DTensor) else None
    if target is not None and _is_in_place(func):
        cut = tree_map(lambda value: _cut_as(value, target, func, name), (args[1:], kwargs))
        try:
            plainly(func, target, *cut[0], **cut[1])
        except RuntimeError as again:
            raise _explained(func, name, again) from again
        return target
    if kwargs.get("out") is not None:
        raise _explained(func, name, error) from error
    with torch.no_grad():
        whole = tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, (args, kwargs))
        return func(*whole[0], **whole[1])


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__") or name == "__setitem__"


def _cut_as(value: Any, target: DTensor, func: Callable[..., Any], name: str) -> Any:
    """A plain tensor, which all ranks have alike, cut into rows as the weight `target` is; other values as they are."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.ndim == 0:
        return value
    if value.shape != target.shape:
        try:
            value = value.expand(target.shape)
        except RuntimeError:
            raise SuperScaleError(
                f"{_said(func)} on the weight {name!r} of shape {tuple(target.shape)} was given a tensor of shape "
                f"{tuple(value.shape)}. Give a tensor of the weight's shape, equal on every rank."
            ) from None
    return placed_like(local_part(value, target).to(target.device), cast(Tensor, target))


def _said(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    return f"{name}()" if name.isidentifier() else name


def _gradient_past_module(func: Callable[..., Any], name: str, shard: DTensor, leaves: list[Any]) -> SuperScaleError:
    if not any(isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) for leaf in leaves) and (
        func is not Tensor.backward
    ):
        return SuperScaleError(
            f"{_said(func)} needs the whole weight {name!r}, of which ZeRO-3 has given this rank its rows, and a "
            f"gradient was asked for. Compute it under torch.no_grad(), which every rank enters; or {FULL_PARAMS}."
        )
    if shard.is_leaf and func is not Tensor.backward:
        return SuperScaleError(
            f"{_said(func)} was called with the weight {name!r} outside of its module: a part of a module was called "
            "while the module's parameters were shards. With ZeRO-3 the modules that are gathered together are used by "
            "calling the outermost of them: call that, or name the parts that your code calls, as in "
            "ZeroConfig(stage=3, wrap=['vision', 'text']), or use ZeRO-2."
        )
    return SuperScaleError(
        f"a loss was computed from the weight {name!r} outside of its module ({_said(func)}), as penalties on weights "
        "are. With ZeRO-3 each rank has rows of it there, to which no gradient of a loss leads. Use the optimizer's "
        "weight_decay, or compute the penalty in the forward() of the module that is gathered, or use ZeRO-2. A "
        "number that is only logged needs no gradient: compute it under torch.no_grad()."
    )


def _no_memory(name: str) -> SuperScaleError:
    return SuperScaleError(
        f"the memory of the weight {name!r} was asked for, as safetensors does. With ZeRO-3 every rank has rows of it. "
        f"{FULL_PARAMS}: save those; or save a checkpoint and export it: `superscale checkpoint export`."
    )


def _explained(func: Callable[..., Any], name: str, error: RuntimeError) -> SuperScaleError:
    if _NOT_IN_GRAPH in str(error):
        return SuperScaleError(
            f"torch.autograd.grad was given tensors that are in no graph, the weight {name!r} or others. With ZeRO-3 "
            "parameters are shards outside of their module's forward: gradients of a loss by parameters are made by "
            "backward() alone. Take them by activations or inputs, or use ZeRO-2."
        )
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return SuperScaleError(
        f"{_said(func)} failed on the weight {name!r}, of which ZeRO-3 has given this rank its rows: {said} "
        f"{FULL_PARAMS}, to read, and with writes=True to edit; or use ZeRO-2."
    )
