"""Explains torch's errors where user code used sharded parameters as if they were unsharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.weights.sharded_operations import FULL_PARAMS

# Parts of torch's messages where user code uses shards as if they were unsharded parameters.
_NOT_IN_GRAPH = "appears to not have been used in the graph"
_MIXED = "got mixed torch.Tensor and DTensor"
_SAVE = "save_pretrained"


def check_backward_inputs(inputs: Tensor | Iterable[Tensor] | None) -> None:
    """Refuse a backward into sharded parameters, which are in no graph.

    Args:
        inputs: the argument of `Tensor.backward`: tensors whose gradients are made; None for all leaves.

    Raises:
        SuperScaleError: an input is a DTensor; says what to do instead.
    """
    if isinstance(inputs, Tensor):
        inputs = [inputs]
    if inputs is not None and any(isinstance(tensor, DTensor) for tensor in inputs):
        raise SuperScaleError(
            "backward(inputs=...) was given parameters, which are shards between forward and step with ZeRO-3, and in "
            "no graph. Freeze the other parameters instead (toggle_optimizer, requires_grad_), or use ZeRO-2."
        )


def explain(error: RuntimeError) -> None:
    """Raise an explanation of an error of torch's that comes of user code using a shard; return for other errors.

    Raises:
        SuperScaleError: chained from `error`, whose message is a known one of torch's about shards.
    """
    if isinstance(error, SuperScaleError):
        return
    if _NOT_IN_GRAPH in str(error):
        raise SuperScaleError(
            "torch.autograd.grad was given tensors that are in no graph. With ZeRO-3 parameters are shards outside of "
            "their module's forward: gradients of a loss by parameters are made by backward() alone. Take them by "
            "activations or inputs, or use ZeRO-2."
        ) from error
    if _MIXED in str(error):
        raise SuperScaleError(
            "a part of a module was called while the module's parameters were shards. With ZeRO-3 the modules that are "
            "gathered together are used by calling the outermost of them: call that, or name the parts that your code "
            "calls, as in ZeroConfig(stage=3, wrap=['vision', 'text']), or use ZeRO-2."
        ) from error


def refuse_copies(module: nn.Module, name: str) -> Callable[[], None]:
    """Refuse `copy.deepcopy` of a sharded module; returns what allows it again."""

    def refuse(memo: Any) -> Any:
        raise SuperScaleError(
            f"copy.deepcopy was given the module {name or type(module).__name__!r}, which ZeRO-3 has cut into rows. "
            "ShardedEMA averages weights of every stage. For other copies copy the module before fit(), in __init__ or "
            f"configure_model, and bring it up to date with whole weights: {FULL_PARAMS}. Or use ZeRO-2."
        )

    module.__dict__["__deepcopy__"] = refuse
    return lambda: module.__dict__.pop("__deepcopy__", None)


def refuse_saves(root: nn.Module) -> list[Callable[[], None]]:
    """Refuse Hugging Face's `save_pretrained` of sharded weights that are not handed whole; returns what undoes it."""
    models = {name: module for name, module in root.named_modules() if callable(getattr(module, _SAVE, None))}
    return [_refuse_save(model, name) for name, model in models.items()]


def _refuse_save(model: nn.Module, name: str) -> Callable[[], None]:
    save = getattr(model, _SAVE)

    def save_whole(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is None:
            prefix = f"without the prefix {name + '.'!r}, " if name else ""
            raise SuperScaleError(
                f"save_pretrained() was called on {name or type(model).__name__!r}, of whose weights ZeRO-3 has given "
                f"every rank its rows. {FULL_PARAMS}: pass those, {prefix}as state_dict=..., on rank 0. Or save a "
                "checkpoint and export it: `superscale checkpoint export last.ckpt model --to hf`."
            )
        return save(*args, **kwargs)

    model.__dict__[_SAVE] = save_whole
    return lambda: model.__dict__.pop(_SAVE, None)
