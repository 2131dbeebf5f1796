"""Explains torch's errors where user code used sharded parameters as if they were unsharded."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_superscale.errors import SuperScaleError

# Parts of torch's messages where user code uses shards as if they were unsharded parameters.
_NOT_IN_GRAPH = "appears to not have been used in the graph"
_MIXED = "got mixed torch.Tensor and DTensor"


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
