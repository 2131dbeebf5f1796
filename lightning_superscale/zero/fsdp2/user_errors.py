"""Says in our words what torch can't know about sharded parameters that user code meets."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_superscale.errors import SuperScaleError

# What torch says where user code meets shards that it takes for unsharded parameters.
_NOT_IN_GRAPH = "appears to not have been used in the graph"
_MIXED = "got mixed torch.Tensor and DTensor"


def check_backward_inputs(inputs: Tensor | Iterable[Tensor] | None) -> None:
    """Refuse a backward into sharded parameters, which are in no graph.

    Args:
        inputs: of `Tensor.backward`: the tensors that gradients are made of; None for all.

    Raises:
        SuperScaleError: says what to do instead.
    """
    if isinstance(inputs, Tensor):
        inputs = [inputs]
    if inputs is not None and any(isinstance(tensor, DTensor) for tensor in inputs):
        raise SuperScaleError(
            "backward(inputs=...) was given parameters, which are shards between forward and step with ZeRO-3, and in "
            "no graph. Freeze the other parameters instead (toggle_optimizer, requires_grad_), or use ZeRO-2."
        )


def explain(error: RuntimeError) -> None:
    """Raise an error of torch's again in words that help, where user code met a shard.

    Raises:
        SuperScaleError: from `error`, where it is of that kind.
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
